"""Images of a data set that are near-duplicates of those of another, as a validation set (RevCol, appendix C.2)."""
