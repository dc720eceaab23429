"""Analyses of a model: audit of its gradients, reconstruction of its states, gains, and memory scaling."""

from revnets.analysis.reconstruction import observed

__all__ = ["observed"]
