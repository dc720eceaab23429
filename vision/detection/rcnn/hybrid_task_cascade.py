"""HTC (Chen et al., "Hybrid Task Cascade for Instance Segmentation", CVPR 2019) on a RevCol (Table 12 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision.detection.detector_options import require_counts
from vision.detection.feature_pyramid import STRIDES
from vision.detection.rcnn.box_heads import BoxStage, SampledBoxes
from vision.detection.rcnn.cascade_rcnn import CascadeHeads, RegionDetector, build_detector
from vision.detection.rcnn.mask_heads import MaskHead
from vision.detection.training_targets import Target, semantic_maps

SEMANTIC_WEIGHT = 0.2
FUSED_LEVEL = 1
"""Index of the pyramid level whose resolution the semantic branch uses, stride 8."""


class HybridTaskHeads(CascadeHeads):
    """A cascade whose mask heads train on refined boxes and pass on their features, with a semantic branch.

    Args:
        channels: Channels of the pyramid.
        num_classes: Number of classes without background.
        stuff_classes: Number of classes of the semantic maps; None for no semantic branch.
        options: Options of `CascadeHeads`.
    """

    def __init__(self, channels: int, num_classes: int, *, stuff_classes: int | None = None, **options: Any):
        super().__init__(channels, num_classes, low_quality=True, flow=True, **options)
        self.semantic = None if stuff_classes is None else SemanticBranch(channels, stuff_classes)

    def inputs(
        self, features: dict[str, Tensor], targets: Sequence[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        levels = list(features.values())
        if self.semantic is None:
            return levels[: len(STRIDES)], {}, None
        logits, embedding = self.run(self.semantic, levels)
        losses = {}
        if targets is not None:
            goals = semantic_maps(targets, logits.shape[1], tuple(logits.shape[-2:]), STRIDES[FUSED_LEVEL])
            losses["loss_semantic"] = SEMANTIC_WEIGHT * semantic_loss(logits, goals)
        return levels[: len(STRIDES)], losses, embedding

    def mask_samples(
        self, stage: BoxStage, samples: SampledBoxes, refined: list[Tensor], targets: Sequence[Target]
    ) -> SampledBoxes:
        """Sample boxes from those that the stage has refined."""
        return stage.sample(refined, targets)

    def mask_logits(self, index: int, levels: Sequence[Tensor], boxes: list[Tensor], semantic: Tensor | None) -> Tensor:
        """Return the logits of a stage, whose mask head receives the features of all previous mask heads."""
        pooled, features = self.mask_pool(levels, boxes, semantic), None
        heads = cast(list[MaskHead], list(self.mask_heads))[: index + 1]
        for head in heads:
            features = head.features(pooled, features)
        return heads[-1].predictor(features)

    def mask_probabilities(
        self, levels: Sequence[Tensor], boxes: list[Tensor], labels: Tensor, semantic: Tensor | None
    ) -> Tensor:
        """Return the masks (boxes, 28, 28) of labels (boxes,) from the last stage."""
        rows = torch.arange(len(labels), device=labels.device)
        logits = self.mask_logits(len(self.mask_heads) - 1, levels, boxes, semantic)
        return logits[rows, labels].float().sigmoid()


class SemanticBranch(nn.Module):
    """Sums the pyramid levels at stride 8 and predicts class scores and an embedding after four convolutions.

    Args:
        channels: Channels of the pyramid and of the branch.
        num_classes: Number of classes of the semantic maps.
    """

    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.lateral = nn.ModuleList(_convolution(channels, 1) for _ in (*STRIDES, 64))
        self.convolutions = nn.Sequential(*(_convolution(channels, 3) for _ in range(4)))
        self.embedding, self.logits = _convolution(channels, 1), nn.Conv2d(channels, num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Map levels of strides 4 to 64 to scores (B, classes, H', W') and embeddings (B, channels, H', W')."""
        fused = self.lateral[FUSED_LEVEL](levels[FUSED_LEVEL])
        for index, (lateral, level) in enumerate(zip(self.lateral, levels, strict=True)):
            if index != FUSED_LEVEL:
                resized = F.interpolate(level, fused.shape[-2:], mode="bilinear", align_corners=True)
                fused = fused + lateral(resized)
        features = self.convolutions(fused)
        return self.logits(features), self.embedding(features)


def semantic_loss(logits: Tensor, maps: Tensor) -> Tensor:
    """Return the cross entropy of logits (B, classes, H, W) and maps (B, H, W), averaged over all pixels.

    Pixels with the value 255 count as a loss of 0.
    """
    return F.cross_entropy(logits, maps, ignore_index=255, reduction="sum") / maps.numel()


def htc(
    backbone: str,
    num_classes: int,
    stuff_classes: int | None = None,
    *,
    masks: bool = True,
    channels: int = 256,
    width: int = 1024,
    mask_width: int = 256,
    score_threshold: float = 0.001,
    soft_nms: bool = True,
    checkpoint_heads: bool = False,
    **backbone_options: Any,
) -> RegionDetector:
    """Build a Hybrid Task Cascade on a RevCol with newly initialized weights.

    Args:
        backbone: A RevCol model name such as `revcol_huge`.
        num_classes: Number of classes without background, 80 for COCO. Labels are 1 to this number.
        stuff_classes: Number of classes of the semantic maps, 183 for COCO-Stuff; None for no semantic branch.
        masks: Whether to predict masks.
        channels: Channels of the feature pyramid.
        width: Width of the linear layers for boxes.
        mask_width: Channels of the convolutions for masks.
        score_threshold: Minimum score of detections.
        soft_nms: Lower the scores of overlapping detections instead of removing them.
        checkpoint_heads: Recompute the activations of pyramid and heads in backward instead of storing them.
        backbone_options: Options of the backbone, such as `kernel_size`, `drop_path_rate` and `memory`.

    Returns:
        A `RegionDetector`. With `stuff_classes`, targets also need a `semantic_map` (H, W) of classes from 0, where 255
        is ignored.

    Raises:
        ValueError: If the backbone does not exist, has a memory budget, or rejects an option, or another option is
            wrong.
    """
    if stuff_classes is not None:
        require_counts(1, stuff_classes=stuff_classes)
    heads = {"masks": masks, "width": width, "mask_width": mask_width, "stuff_classes": stuff_classes}
    heads |= {"threshold": score_threshold, "soft": soft_nms}
    return build_detector(HybridTaskHeads, backbone, num_classes, channels, checkpoint_heads, heads, backbone_options)


def _convolution(channels: int, size: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, size, padding=size // 2), nn.ReLU())
