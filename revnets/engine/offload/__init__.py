"""Host memory for what cells keep: copies beside the computation, and the store of one pass."""
