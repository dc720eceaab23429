"""Attention and transformer blocks in plain PyTorch, without fairseq."""
