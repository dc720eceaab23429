"""RevCol for images: the family in timm's registry, its supervision, training, evaluation and recipes."""

from vision import revcol  # timm knows the family from here on
from vision.models.architecture import RevCol

__all__ = ["RevCol", "revcol"]
