"""Small helpers of a run: seeds and signals."""
