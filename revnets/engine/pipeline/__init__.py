"""Stages of a pipeline: reversible columns divided among processes."""
