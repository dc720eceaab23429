"""Detectors that classify regions of an image: proposals, cascades of heads for boxes and masks, HTC."""
