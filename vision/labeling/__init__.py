"""Soft labels for images without any: a teacher, the processes that share its work, and Ray Data."""
