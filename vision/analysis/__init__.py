"""Analyses of trained image models: CKA and LayerCAM."""
