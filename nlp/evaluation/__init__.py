"""Checkpoint averaging and BLEU."""
