"""Building blocks of networks: blocks, fusions, stems and heads, registered by name."""
