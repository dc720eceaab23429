"""Region proposals (Ren et al., "Faster R-CNN", 2015) with torchvision's network and mmdetection's matching."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

from vision.detection.feature_pyramid import STRIDES
from vision.detection.training_targets import Target
from vision.models.recomputation import recomputed
from vision.models.simulated_values import is_simulated, rows_where

BACKGROUND, IGNORED_BOX = -1, -2
"""Matches of boxes that do not overlap any object enough, and of boxes that do not count."""


class RegionProposals(RegionProposalNetwork):
    """Proposes boxes that may contain an object, from a pyramid with levels of strides 4 to 64.

    Constants are those of mmdetection's Cascade Mask R-CNN. Anchors that cross the border of an image do not count.

    Args:
        channels: Channels of the pyramid.
        recompute: Recompute the activations of the convolutions in backward instead of storing them.
    """

    def __init__(self, channels: int, *, recompute: bool = False):
        anchors = StridedAnchors(tuple((8 * stride,) for stride in (*STRIDES, 64)), ((0.5, 1.0, 2.0),) * 5)
        kept = {"training": 2000, "testing": 1000}
        head = RecomputedProposalHead(channels, 3) if recompute else RPNHead(channels, 3)
        super().__init__(anchors, head, 0.7, 0.3, 256, 0.5, kept, kept, 0.7)
        self.box_coder = FloatBoxCoder((1.0, 1.0, 1.0, 1.0))
        self.fg_bg_sampler = BoxSampler(256, 0.5)
        self.matcher = OverlapMatcher(0.7, 0.3, low_quality=0.3)

    def filter_proposals(
        self,
        proposals: Tensor,
        objectness: Tensor,
        image_shapes: list[tuple[int, int]],
        num_anchors_per_level: list[int],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the boxes and scores of each image after suppression; the largest possible number if simulated."""
        if not is_simulated(proposals):
            return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        candidates = sum(min(count, self.pre_nms_top_n()) for count in num_anchors_per_level)
        most = min(candidates, self.post_nms_top_n())
        scores = objectness.detach().reshape(len(proposals), -1)[:, :most].sigmoid()
        return list(proposals[:, :most].clone()), list(scores)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return 1 (object), 0 (background) or -1 (ignored) for each anchor, and the matched boxes, for each image."""
        labels, boxes = [], []
        for places, target in zip(anchors, targets, strict=True):
            height, width = target["image_size"]
            inside = (places[:, :2] >= 0).all(1) & (places[:, 2] < width) & (places[:, 3] < height)
            matches = torch.full_like(inside, IGNORED_BOX, dtype=torch.long)
            rows = rows_where(inside, len(inside))
            matches[rows] = self.matcher(target["boxes"], places[rows])
            labels.append(torch.where(matches >= 0, 1.0, torch.where(matches == BACKGROUND, 0.0, -1.0)))
            matched = torch.cat([target["boxes"], target["boxes"].new_zeros(2, 4)])[matches]
            boxes.append(torch.where(matches[:, None] >= 0, matched, places))
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and boxes, which are 0 if no anchor fits into the images."""
        samples = [self.fg_bg_sampler(each >= 1, each == 0) for each in labels]
        starts = [number * len(each) for number, each in enumerate(labels)]
        positive, negative = (
            torch.cat([rows + start for rows, start in zip(part, starts, strict=True)])
            for part in zip(*samples, strict=True)
        )
        sampled = torch.cat([positive, negative])
        if not len(sampled):
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        goals = torch.cat(regression_targets)[positive]
        distance = F.smooth_l1_loss(pred_bbox_deltas[positive], goals, beta=1 / 9, reduction="sum")
        entropy = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled])
        return entropy, distance / len(sampled)


class RecomputedProposalHead(RPNHead):
    """torchvision's convolutions with activations that are recomputed in backward."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return recomputed(super().forward, x)


class StridedAnchors(AnchorGenerator):
    """Anchors at the strides of the pyramid, without rounding.

    torchvision computes strides from the sizes of the padded batch and the map, which is wrong for stride 64.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], aspect_ratios: tuple[tuple[float, ...], ...]):
        super().__init__(sizes, aspect_ratios)
        self.cell_anchors = []  # not buffers, so they would neither move with the module nor be copied by a simulation

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """Return boxes (ratios x scales, 4) around the origin. A ratio is height / width."""
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        heights, widths = ((factor[:, None] * sides).flatten() / 2 for factor in (roots, 1 / roots))
        return torch.stack([-widths, -heights, widths, heights], dim=1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the anchors (N, 4) of all levels, which are the same for each image."""
        device = feature_maps[0].device
        anchors = []
        for level, stride, sizes, ratios in zip(
            feature_maps, (*STRIDES, 64), self.sizes, self.aspect_ratios, strict=True
        ):
            y, x = (torch.arange(count, device=device) * stride for count in level.shape[-2:])
            centers = torch.stack([*torch.meshgrid(x, y, indexing="xy")] * 2, -1)
            boxes = centers[:, :, None] + self.generate_anchors(list(sizes), list(ratios), device=device)
            anchors.append(boxes.flatten(0, 2))
        return [torch.cat(anchors)] * len(image_list.image_sizes)


class SampledRows(NamedTuple):
    """Indices of the sampled boxes of an image, in ascending order."""

    positive: Tensor
    negative: Tensor


class BoxSampler(BalancedPositiveNegativeSampler):
    """torchvision's random sampling of the boxes of one image, with the same random numbers."""

    @property
    def most_positive(self) -> int:
        """Maximum number of positive boxes."""
        return int(self.batch_size_per_image * self.positive_fraction)

    def __call__(self, positive: Tensor, negative: Tensor) -> SampledRows:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Sample at most `batch_size_per_image` of N boxes, at most a fraction `positive_fraction` of them positive.

        Args:
            positive: Whether each box (N,) is positive.
            negative: Whether each box (N,) is negative.
        """
        found = _drawn(positive, self.most_positive, self.most_positive)
        count = self.batch_size_per_image - len(found)
        return SampledRows(found, _drawn(negative, count, len(negative) - len(found)))


def _drawn(mask: Tensor, count: int, most: int) -> Tensor:
    """Draw at most `count` of the indices where a mask is true, of which there are at most `most`."""
    rows = rows_where(mask, most)
    return rows[torch.randperm(len(rows), device=rows.device)[:count]].sort().values


class OverlapMatcher:
    """Matches boxes with objects by intersection over union, as mmdetection's `MaxIoUAssigner` does.

    Args:
        positive: Minimum overlap at which a box is matched with the object that it overlaps most.
        negative: Overlap below which a box is background. Boxes between both thresholds do not count.
        low_quality: Minimum overlap at which an object is also matched with the boxes that overlap it most. If several
            objects claim a box, the last one gets it.
    """

    def __init__(self, positive: float, negative: float, low_quality: float | None = None):
        self.positive, self.negative, self.low_quality = positive, negative, low_quality

    def __call__(self, objects: Tensor, boxes: Tensor) -> Tensor:
        """Return the index of an object, `BACKGROUND` or `IGNORED_BOX` for each of N boxes, given M objects (M, 4)."""
        if not len(objects) or not len(boxes):
            return torch.full((len(boxes),), BACKGROUND, device=boxes.device)
        overlap = box_iou(objects, boxes)
        best, matches = overlap.max(0)
        matches = matches.masked_fill(best < self.positive, IGNORED_BOX)
        matches = matches.masked_fill(best < self.negative, BACKGROUND)
        if self.low_quality is not None:
            highest = overlap.max(1, keepdim=True).values
            taken = (overlap == highest) & (highest >= self.low_quality)
            last = len(objects) - 1 - taken.flip(0).byte().argmax(0)
            matches = torch.where(taken.any(0), last, matches)
        return matches


class FloatBoxCoder(BoxCoder):
    """torchvision's coder in at least float32, with mmdetection's lower and upper bounds for changes of a side."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Decode codes (N, 4 k) of boxes (N, 4) to k boxes each, (N, 4 k)."""
        codes = rel_codes.to(torch.promote_types(rel_codes.dtype, torch.float32)).unflatten(1, (-1, 4))
        least = -self.bbox_xform_clip * codes.new_tensor(self.weights[2:])
        codes = torch.cat([codes[..., :2], codes[..., 2:].maximum(least)], -1)
        return super().decode_single(codes.flatten(1), boxes)
