"""Intermediate supervision: heads and decoders on the columns, and its training task (RevCol, section 2.3)."""

from vision.config.learning import SupervisionConfig
from vision.supervision.supervised import HeadsEvaluator, Outputs, Supervised, reconstruction_loss

__all__ = ["HeadsEvaluator", "Outputs", "Supervised", "SupervisionConfig", "reconstruction_loss"]
