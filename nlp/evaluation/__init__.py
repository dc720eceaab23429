"""Averaged checkpoints and BLEU."""
