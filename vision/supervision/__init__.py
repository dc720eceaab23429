"""Intermediate supervision: heads and decoders on the columns, and its training task."""
