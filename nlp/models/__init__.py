"""RevCol-Transformer as models of fairseq."""
