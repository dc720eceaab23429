"""Memory of a training step: measurement, estimation on fake tensors, and planning under a budget."""

from revnets.engine.replay.replay_context import outside_of_autocast

__all__ = ["outside_of_autocast"]
