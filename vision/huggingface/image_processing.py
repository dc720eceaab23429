"""How images are prepared for a RevCol model in transformers."""

from __future__ import annotations

from transformers import ConvNextImageProcessor

from vision.models.architecture import RevCol


def image_processor(model: RevCol) -> ConvNextImageProcessor:
    """The processor of transformers that does what timm's evaluation of this model does.

    Below 384 pixels, the shorter side is resized to `input_size / crop_pct` and the middle is cropped; larger images
    are squeezed to the full size. ConvNeXt's processor has the same rule.
    """
    cfg = model.pretrained_cfg
    return ConvNextImageProcessor(
        size={"shortest_edge": cfg["input_size"][-1]},
        crop_pct=cfg["crop_pct"],
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )
