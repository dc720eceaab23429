"""Near-duplicates between two sets of images, such as training and validation set (RevCol, appendix C.2)."""
