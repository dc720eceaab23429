"""Registration of RevCol with transformers."""

from __future__ import annotations

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    ConvNextImageProcessor,
)

from vision.huggingface.backbone import RevColBackbone
from vision.huggingface.classifier import RevColForImageClassification
from vision.huggingface.configuration import RevColBackboneConfig


def register() -> None:
    """Register RevCol with the `Auto` classes of transformers under the `model_type` of its configuration."""
    config = RevColBackboneConfig
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoBackbone.register(config, RevColBackbone, exist_ok=True)
    AutoModelForImageClassification.register(config, RevColForImageClassification, exist_ok=True)
    processors = {"torchvision": ConvNextImageProcessor}
    AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
