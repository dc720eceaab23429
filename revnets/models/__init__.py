"""Whole models: networks built from a specification, models loaded by name, and their memory plans."""

from revnets.models.loading import load_model

__all__ = ["load_model"]
