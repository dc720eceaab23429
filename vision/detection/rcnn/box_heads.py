"""One stage of a cascade, which samples, classifies and refines boxes (Cai and Vasconcelos, "Cascade R-CNN", 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.ops import clip_boxes_to_image

from vision.detection.box_losses import giou_losses
from vision.detection.rcnn.region_proposals import BoxSampler, FloatBoxCoder, OverlapMatcher
from vision.detection.rcnn.roi_pooling import RoIPool
from vision.detection.training_targets import Target
from vision.models.simulated_values import rows_where

GIOU_WEIGHT = 10.0


class SampledBoxes(NamedTuple):
    """The boxes of each image that a stage trains on.

    Attributes:
        boxes: (n, 4).
        matches: (n,), index of the object of each box, -1 for background.
        is_object: (n,), whether a box is the annotated box of an object.
    """

    boxes: list[Tensor]
    matches: list[Tensor]
    is_object: list[Tensor]

    def labels(self, targets: Sequence[Target]) -> Tensor:
        """Return the classes of all boxes, 0 for background."""
        pairs = zip(targets, self.matches, strict=True)
        return torch.cat([F.pad(target["labels"], (0, 1))[matches] for target, matches in pairs])

    def goals(self, targets: Sequence[Target]) -> Tensor:
        """Return the annotated boxes (sum of n, 4) that belong to all boxes, zeros for background."""
        pairs = zip(targets, self.matches, strict=True)
        return torch.cat([F.pad(target["boxes"], (0, 0, 0, 1))[matches] for target, matches in pairs])


class BoxStage(nn.Module):
    """Four convolutions and a linear layer that predict class scores and a box for each class.

    Args:
        channels: Channels of the pyramid.
        num_classes: Number of classes without background.
        overlap: Minimum intersection over union of a box with its object.
        stds: Standard deviations of the codes of center and size.
        width: Width of the linear layer.
        norm: Class of the normalization layers.
        low_quality: Whether objects are also matched with the boxes that overlap them most (see `OverlapMatcher`).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        overlap: float,
        stds: tuple[float, float, float, float],
        *,
        width: int = 1024,
        norm: type[nn.Module] = nn.BatchNorm2d,
        low_quality: bool = False,
    ):
        super().__init__()
        self.pool = RoIPool(7)
        self.head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [width], norm)
        self.predictor = FastRCNNPredictor(width, num_classes + 1)
        for layer, std in ((self.predictor.cls_score, 0.01), (self.predictor.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.coder = FloatBoxCoder((1 / stds[0], 1 / stds[1], 1 / stds[2], 1 / stds[3]))
        self.matcher = OverlapMatcher(overlap, overlap, overlap if low_quality else None)
        self.sampler = BoxSampler(512, 0.25)

    def forward(
        self, levels: Sequence[Tensor], boxes: list[Tensor], semantic: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return scores (boxes, classes + 1), background first, and codes (boxes, 4 (classes + 1)) of all boxes."""
        return self.predictor(self.head(self.pool(levels, boxes, semantic)))

    @torch.no_grad()
    def sample(self, boxes: list[Tensor], targets: Sequence[Target]) -> SampledBoxes:
        """Sample up to 512 boxes of each image, up to a quarter with objects. Candidates include annotated boxes."""
        samples = SampledBoxes([], [], [])
        for proposals, target in zip(boxes, targets, strict=True):
            count = len(target["boxes"])
            candidates = torch.cat([target["boxes"].to(proposals.dtype), proposals])
            own = torch.arange(count, device=proposals.device)
            matches = torch.cat([own, self.matcher(target["boxes"], proposals)])
            kept = torch.cat(self.sampler(matches >= 0, matches < 0)).sort().values
            samples.boxes.append(candidates[kept])
            samples.matches.append(matches[kept])
            samples.is_object.append(kept < count)
        return samples

    def losses(
        self, scores: Tensor, codes: Tensor, samples: SampledBoxes, targets: Sequence[Target]
    ) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of all boxes and 10 times the GIoU loss of boxes with objects, per sampled box."""
        labels, goals = samples.labels(targets), samples.goals(targets)
        positive = rows_where(labels > 0, len(targets) * self.sampler.most_positive)
        found = self._decoded(codes[positive], torch.cat(samples.boxes)[positive], labels[positive])
        regression = giou_losses(found, goals[positive]).sum() / len(labels)
        return F.cross_entropy(scores, labels), GIOU_WEIGHT * regression

    @torch.no_grad()
    def refined(
        self,
        scores: Tensor,
        codes: Tensor,
        boxes: list[Tensor],
        sizes: Sequence[tuple[int, int]],
        labels: Tensor | None = None,
    ) -> list[Tensor]:
        """Refine the boxes of each image by the codes of one class, and clip them to the image.

        Args:
            scores: (boxes, classes + 1).
            codes: (boxes, 4 (classes + 1)).
            boxes: (n, 4) of each image.
            sizes: Heights and widths of the images.
            labels: Class of each box. Where it is 0 or missing, the class with the highest score is used.
        """
        classes = scores[:, 1:].argmax(1) + 1
        if labels is not None:
            classes = torch.where(labels > 0, labels, classes)
        moved = self._decoded(codes, torch.cat(boxes), classes).split([len(places) for places in boxes])
        return [clip_boxes_to_image(places, size) for places, size in zip(moved, sizes, strict=True)]

    def all_boxes(self, codes: Tensor, boxes: Tensor) -> Tensor:
        """Decode boxes (n, classes + 1, 4) of all classes from codes (n, 4 (classes + 1)) and boxes (n, 4)."""
        return self.coder.decode_single(codes, boxes).unflatten(1, (-1, 4))

    def _decoded(self, codes: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        rows = torch.arange(len(labels), device=labels.device)
        return self.coder.decode_single(codes.unflatten(1, (-1, 4))[rows, labels], boxes)
