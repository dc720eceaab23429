"""The image processor of RevCol models in transformers."""

from __future__ import annotations

from transformers import ConvNextImageProcessor

from vision.models.architecture import RevCol


def image_processor(model: RevCol) -> ConvNextImageProcessor:
    """Return the processor of transformers that matches timm's evaluation of a model.

    For input sizes below 384 pixels, it resizes the shorter side to `input_size / crop_pct` and crops the center. For
    larger ones, it resizes the whole image to a square. ConvNeXt's processor follows the same rule.
    """
    cfg = model.pretrained_cfg
    return ConvNextImageProcessor(
        size={"shortest_edge": cfg["input_size"][-1]},
        crop_pct=cfg["crop_pct"],
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )
