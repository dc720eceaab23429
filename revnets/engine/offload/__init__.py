"""Offloading to host memory of what cells keep: asynchronous copies, and the store of one pass."""
