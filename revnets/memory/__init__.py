"""Memory of a training step: measured, estimated on fake tensors, planned and kept under a budget."""

from revnets.engine.replay.replay_context import outside_of_autocast

__all__ = ["outside_of_autocast"]
