"""Soft labels that a teacher has predicted: their files, and training sets that are joined with them."""
