"""The reversible engine: the graph of cells, the tape that rebuilds states in backward, and the lost bits.

It depends on PyTorch and NumPy only.
"""
