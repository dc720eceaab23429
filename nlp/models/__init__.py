"""RevCol-Transformer models for fairseq."""
