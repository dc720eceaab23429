"""Analyses of a model: the audit of its gradients, its reconstructions, its gains and how its memory scales."""

from revnets.analysis.reconstruction import observed

__all__ = ["observed"]
