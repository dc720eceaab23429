"""Errors of the engine."""

from __future__ import annotations


class ReplayError(RuntimeError):
    """A replay that cannot give, or did not give, what the forward gave."""


class ReconstructionError(ReplayError):
    """A state of the backward is not, bit for bit, that of the forward."""
