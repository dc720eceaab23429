"""Semantic segmentation with RevCol backbones: UperNet and Mask2Former of transformers, inference and mean IoU."""

from vision.segmentation.inference import semantic_probabilities, sliding_window
from vision.segmentation.metrics import IoUEvaluator
from vision.segmentation.segmenters import Mask2Former, UperNet, mask2former, upernet

__all__ = [
    "IoUEvaluator",
    "Mask2Former",
    "UperNet",
    "mask2former",
    "semantic_probabilities",
    "sliding_window",
    "upernet",
]
