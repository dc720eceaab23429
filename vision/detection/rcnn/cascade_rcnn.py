"""Cascade Mask R-CNN on a RevCol (Table 2 and appendix D.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from vision.detection.detector_options import require_counts, require_numbers
from vision.detection.feature_pyramid import STRIDES, RevColPyramid
from vision.detection.rcnn.box_heads import BoxStage, SampledBoxes
from vision.detection.rcnn.mask_heads import MaskHead, mask_loss, pasted_masks
from vision.detection.rcnn.region_proposals import RegionProposals
from vision.detection.rcnn.roi_pooling import RoIPool
from vision.detection.rcnn.suppression import best_detections
from vision.detection.training_targets import Target, checked_targets, padded_batch
from vision.models.architecture import RevCol
from vision.models.recomputation import recomputed
from vision.models.simulated_values import rows_where

OVERLAPS = (0.5, 0.6, 0.7)
CODE_STDS = ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)

Sizes = Sequence[tuple[int, int]]
"""Heights and widths of images."""


class CascadeHeads(nn.Module):
    """Three stages of box and mask heads. Each stage trains on the boxes that the previous one has refined.

    Args:
        channels: Channels of the pyramid.
        num_classes: Number of classes without background.
        masks: Whether there are mask heads.
        width: Width of the linear layers for boxes.
        mask_width: Channels of the convolutions for masks.
        norm: Class of the normalization layers of the convolutions for boxes.
        low_quality: Whether objects are also matched with the boxes that overlap them most.
        flow: Whether a mask head passes its features to the next one.
        recompute: Recompute the activations of the heads in backward instead of storing them.
        detection_options: Options of `best_detections`.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        masks: bool = True,
        width: int = 1024,
        mask_width: int = 256,
        norm: type[nn.Module] = nn.BatchNorm2d,
        low_quality: bool = False,
        flow: bool = False,
        recompute: bool = False,
        **detection_options: Any,
    ):
        super().__init__()
        options = {"width": width, "norm": norm, "low_quality": low_quality}
        stages = zip(OVERLAPS, CODE_STDS, strict=True)
        self.box_stages = nn.ModuleList(BoxStage(channels, num_classes, *stage, **options) for stage in stages)
        self.mask_pool = RoIPool(14)
        self.mask_heads = nn.ModuleList(
            MaskHead(channels, num_classes, mask_width, flow=flow and index > 0)
            for index in range(len(OVERLAPS) if masks else 0)
        )
        self.recompute, self.detection_options = recompute, detection_options

    def losses(
        self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes, targets: Sequence[Target]
    ) -> dict[str, Tensor]:
        """Return the weighted losses of all stages.

        Args:
            features: Maps of the pyramid, finest first.
            boxes: Proposals (n, 4) of each image, at least one in the batch.
            sizes: Heights and widths of the images.
            targets: Targets of the images, from `checked_targets`.
        """
        levels, losses, semantic = self.inputs(features, targets)
        for number, (stage, weight) in enumerate(zip(self.stages(), LOSS_WEIGHTS, strict=True), 1):
            samples = stage.sample(boxes, targets)
            scores, codes = self.run(stage, levels, samples.boxes, semantic)
            classification, regression = stage.losses(scores, codes, samples, targets)
            losses[f"loss_classifier_{number}"] = weight * classification
            losses[f"loss_box_reg_{number}"] = weight * regression
            moved = stage.refined(scores, codes, samples.boxes, sizes, samples.labels(targets))
            boxes = [places[rows_where(~own, len(own))] for places, own in zip(moved, samples.is_object, strict=True)]
            if len(self.mask_heads):
                positive = with_objects(self.mask_samples(stage, samples, boxes, targets), stage.sampler.most_positive)
                logits = self.run(self.mask_logits, number - 1, levels, positive.boxes, semantic)
                losses[f"loss_mask_{number}"] = weight * mask_loss(logits, positive, targets)
        return losses

    def detections(self, features: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """Return boxes of the last stage, and labels, scores and masks from the mean of all stages, for each image."""
        levels, _, semantic = self.inputs(features)
        stages = self.stages()
        scores, codes = stages[0](levels, boxes, semantic)
        logits = scores.float()
        for previous, stage in pairwise(stages):
            boxes = previous.refined(scores, codes, boxes, sizes)
            scores, codes = stage(levels, boxes, semantic)
            logits = logits + scores.float()
        counts = [len(places) for places in boxes]
        probabilities = (logits / len(stages)).softmax(1).split(counts)
        candidates = stages[-1].all_boxes(codes, torch.cat(boxes)).split(counts)
        found = [
            best_detections(scores, places, size, **self.detection_options)
            for scores, places, size in zip(probabilities, candidates, sizes, strict=True)
        ]
        if len(self.mask_heads):
            labels = torch.cat([item["labels"] for item in found])
            masks = self.mask_probabilities(levels, [item["boxes"] for item in found], labels, semantic)
            for item, part, size in zip(
                found, masks.split([len(item["labels"]) for item in found]), sizes, strict=True
            ):
                item["masks"] = pasted_masks(part, item["boxes"], size)
        return found

    def stages(self) -> list[BoxStage]:
        """Return the box heads in order."""
        return cast(list[BoxStage], list(self.box_stages))

    def inputs(
        self, features: dict[str, Tensor], targets: Sequence[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor], Tensor | None]:
        """Return the levels to pool from, losses of other branches, and a map whose pooled values are added."""
        return list(features.values())[: len(STRIDES)], {}, None

    def mask_samples(
        self, stage: BoxStage, samples: SampledBoxes, refined: list[Tensor], targets: Sequence[Target]
    ) -> SampledBoxes:
        """Return the boxes that the mask head of a stage trains on, which are those of its box head."""
        return samples

    def mask_logits(self, index: int, levels: Sequence[Tensor], boxes: list[Tensor], semantic: Tensor | None) -> Tensor:
        """Return the mask logits (boxes, classes + 1, 28, 28) of a stage."""
        return self.mask_heads[index](self.mask_pool(levels, boxes, semantic))

    def mask_probabilities(
        self, levels: Sequence[Tensor], boxes: list[Tensor], labels: Tensor, semantic: Tensor | None
    ) -> Tensor:
        """Return the masks (boxes, 28, 28) of labels (boxes,), averaged over all stages."""
        rows = torch.arange(len(labels), device=labels.device)
        logits = [self.mask_logits(index, levels, boxes, semantic) for index in range(len(self.mask_heads))]
        return torch.stack([each[rows, labels].float().sigmoid() for each in logits]).mean(0)

    def run(self, module: Any, *args: Any) -> Any:
        """Call `module(*args)`, and recompute its activations in backward if `recompute` is set."""
        return recomputed(module, *args) if self.recompute else module(*args)


class RegionDetector(nn.Module):
    """A two-stage detector: region proposals from a pyramid, and heads that classify and refine them.

    It has the interface of torchvision's detectors: in training mode it takes images and targets and returns a
    dictionary of losses; in evaluation mode it takes images and returns a list of dictionaries.

    Args:
        pyramid: The backbone.
        proposals: The first stage.
        heads: The second stage.
        num_classes: Labels are 1 to this number.
    """

    def __init__(self, pyramid: RevColPyramid, proposals: RegionProposals, heads: CascadeHeads, num_classes: int):
        super().__init__()
        self.backbone, self.rpn, self.roi_heads, self.num_classes = pyramid, proposals, heads, num_classes

    @property
    def revcol(self) -> RevCol:
        """The timm model in the backbone."""
        return self.backbone.revcol

    def forward(
        self, images: Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Return losses in training mode and detections in evaluation mode.

        Args:
            images: (3, H, W) each, normalized. Their sizes may differ.
            targets: For each image, `boxes` (N, 4) as (left, top, right, bottom) in pixels, `labels` (N,) from 1, and
                `masks` (N, H, W) of 0 and 1. N may be 0. Boxes are clipped to the image; boxes without an area do not
                count.

        Returns:
            In training mode, a dictionary of weighted losses, to be summed. In evaluation mode, for each image
            `boxes` (N, 4), `labels` (N,), `scores` (N,) in descending order and `masks` (N, 1, H, W), probabilities.

        Raises:
            ValueError: If images or targets have wrong shapes, or labels are out of range.
        """
        images = list(images)
        batch = padded_batch(images, self.revcol.in_chans)
        checked = None
        if self.training:
            checked = checked_targets(images, targets, self.num_classes, masks=len(self.roi_heads.mask_heads) > 0)
        features = self.backbone(batch.tensors)
        boxes, losses = self.rpn(batch, features, checked)
        boxes = [
            places if len(places) else places.new_tensor([[0, 0, width, height]])  # BatchNorm needs at least one box
            for places, (height, width) in zip(boxes, batch.image_sizes, strict=True)
        ]
        if checked is None:
            return self.roi_heads.detections(features, boxes, batch.image_sizes)
        return losses | self.roi_heads.losses(features, boxes, batch.image_sizes, checked)


def cascade_mask_rcnn(
    backbone: str,
    num_classes: int,
    *,
    masks: bool = True,
    channels: int = 256,
    width: int = 1024,
    mask_width: int = 256,
    score_threshold: float = 0.05,
    soft_nms: bool = False,
    checkpoint_heads: bool = False,
    **backbone_options: Any,
) -> RegionDetector:
    """Build a Cascade Mask R-CNN on a RevCol with newly initialized weights.

    Args:
        backbone: A RevCol model name such as `revcol_tiny`.
        num_classes: Number of classes without background, 80 for COCO. Labels are 1 to this number.
        masks: Whether to predict masks. False for Cascade R-CNN, whose targets need no masks.
        channels: Channels of the feature pyramid.
        width: Width of the linear layers for boxes.
        mask_width: Channels of the convolutions for masks.
        score_threshold: Minimum score of detections.
        soft_nms: Lower the scores of overlapping detections instead of removing them.
        checkpoint_heads: Recompute the activations of pyramid and heads in backward instead of storing them.
        backbone_options: Options of the backbone, such as `kernel_size`, `drop_path_rate` and `memory`.

    Returns:
        A `RegionDetector`. If several processes train on GPUs when this is called, BatchNorm of the box heads is
        synchronized across them.

    Raises:
        ValueError: If the backbone does not exist, has a memory budget, or rejects an option, or another option is
            wrong.
    """
    heads = {"masks": masks, "width": width, "mask_width": mask_width}
    heads |= {"threshold": score_threshold, "soft": soft_nms}
    return build_detector(CascadeHeads, backbone, num_classes, channels, checkpoint_heads, heads, backbone_options)


def build_detector(
    kind: type[CascadeHeads],
    backbone: str,
    num_classes: int,
    channels: int,
    recompute: bool,
    options: dict[str, Any],
    backbone_options: dict[str, Any],
) -> RegionDetector:
    """Build a detector with heads of the class `kind`."""
    widths = {name: options[name] for name in ("width", "mask_width")}
    require_counts(1, num_classes=num_classes, channels=channels, **widths)
    require_numbers(1, score_threshold=options["threshold"])
    pyramid = RevColPyramid(backbone, channels, recompute=recompute, **backbone_options)
    distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    norm = nn.SyncBatchNorm if distributed and torch.cuda.is_available() else nn.BatchNorm2d
    heads = kind(channels, num_classes, norm=norm, recompute=recompute, **options)
    return RegionDetector(pyramid, RegionProposals(channels, recompute=recompute), heads, num_classes)


def with_objects(samples: SampledBoxes, most: int) -> SampledBoxes:
    """Return the boxes that have an object, at most `most` of each image."""
    kept = [rows_where(matches >= 0, most) for matches in samples.matches]
    return SampledBoxes(*([part[rows] for part, rows in zip(parts, kept, strict=True)] for parts in samples))
