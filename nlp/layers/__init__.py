"""Attention and transformer blocks in plain PyTorch; they do not need fairseq."""
