"""RevCol as models of Hugging Face transformers: a backbone for its detectors and segmenters, and a classifier.

The classes register themselves with `AutoConfig`, `AutoBackbone`, `AutoModelForImageClassification` and
`AutoImageProcessor` when this package is imported. transformers comes with the extra `hf`.
"""

from vision.huggingface.backbone import RevColBackbone
from vision.huggingface.classifier import RevColForImageClassification
from vision.huggingface.configuration import RevColBackboneConfig
from vision.huggingface.registration import register

register()

__all__ = ["RevColBackbone", "RevColBackboneConfig", "RevColForImageClassification"]
