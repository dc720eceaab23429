"""Soft labels predicted by a teacher: label files, and training sets that use them."""
