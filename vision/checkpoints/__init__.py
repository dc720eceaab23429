"""Checkpoints of a run: files, shards and resuming."""
