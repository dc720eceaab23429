"""RevCol as models of Hugging Face transformers: a backbone for its detectors and segmenters, and a classifier.

Importing this package registers the classes with `AutoConfig`, `AutoBackbone`, `AutoModelForImageClassification` and
`AutoImageProcessor`. The extra `hf` installs transformers.
"""

from vision.huggingface.backbone import RevColBackbone
from vision.huggingface.classifier import RevColForImageClassification
from vision.huggingface.configuration import RevColBackboneConfig
from vision.huggingface.registration import register

register()

__all__ = ["RevColBackbone", "RevColBackboneConfig", "RevColForImageClassification"]
