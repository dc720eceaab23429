"""From raw text to a data set of fairseq."""
