"""Analyses of a model: the audit of its gradients, its reconstructions, its gains and how its memory scales."""

from revnets.engine.columns import observed

__all__ = ["observed"]
