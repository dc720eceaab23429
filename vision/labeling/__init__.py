"""Soft labels for unlabeled images: the teacher, the processes that label shards, and Ray Data."""
