"""The reversible engine: the graph of cells, the tape that rebuilds states in backward, and its codecs. Torch only."""
