"""Region proposals (Ren et al., "Faster R-CNN", 2015) on torchvision's network, matched as mmdetection matches them."""

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
from vision.models.simulated_values import chosen_rows, is_simulated

BACKGROUND, IGNORED_BOX = -1, -2
"""Matches of boxes that overlap no object enough, and of boxes that do not count."""


class RegionProposals(RegionProposalNetwork):
    """Boxes that may hold an object, from a pyramid with levels of strides 4 to 64.

    Constants are those of mmdetection's Cascade Mask R-CNN. Anchors that cross the border of an image do not count.

    Args:
        channels: of the pyramid.
        recompute: keep no activations of the convolutions, and compute them again in backward.
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
        """The boxes and scores of each image after suppression; as many as possible in a simulated step."""
        if not is_simulated(proposals):
            return super().filter_proposals(proposals, objectness, image_shapes, num_anchors_per_level)
        candidates = sum(min(count, self.pre_nms_top_n()) for count in num_anchors_per_level)
        most = min(candidates, self.post_nms_top_n())
        scores = objectness.detach().reshape(len(proposals), -1)[:, :most].sigmoid()
        return list(proposals[:, :most].clone()), list(scores)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each image, 1 (object), 0 (background) or -1 (does not count) for each anchor, and the matched boxes."""
        labels, boxes = [], []
        for places, target in zip(anchors, targets, strict=True):
            height, width = target["image_size"]
            inside = (places[:, :2] >= 0).all(1) & (places[:, 2] < width) & (places[:, 3] < height)
            matches = torch.full_like(inside, IGNORED_BOX, dtype=torch.long)
            rows = chosen_rows(inside, len(inside))
            matches[rows] = self.matcher(target["boxes"], places[rows])
            labels.append(torch.where(matches >= 0, 1.0, torch.where(matches == BACKGROUND, 0.0, -1.0)))
            matched = torch.cat([target["boxes"], target["boxes"].new_zeros(2, 4)])[matches]
            boxes.append(torch.where(matches[:, None] >= 0, matched, places))
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and boxes; 0 for images so small that no anchor lies inside of them."""
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
    """torchvision's convolutions, whose activations backward computes again."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return recomputed(super().forward, x)


class StridedAnchors(AnchorGenerator):
    """Anchors at the strides of the pyramid, with sides that are not rounded.

    torchvision's own divide the size of a padded batch by that of a map, which is no stride for stride 64.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], aspect_ratios: tuple[tuple[float, ...], ...]):
        super().__init__(sizes, aspect_ratios)
        self.cell_anchors = []  # tensors that are no buffers stay where they are when the module moves

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> Tensor:
        """Boxes (ratios x scales, 4) around the origin; a ratio is height / width."""
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.as_tensor(scales, dtype=dtype, device=device)
        heights, widths = ((factor[:, None] * sides).flatten() / 2 for factor in (roots, 1 / roots))
        return torch.stack([-widths, -heights, widths, heights], dim=1)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors (N, 4) of all levels, the same for each image."""
        device = feature_maps[0].device
        anchors = []
        for level, stride, sizes, ratios in zip(
            feature_maps, (*STRIDES, 64), self.sizes, self.aspect_ratios, strict=True
        ):
            y, x = (torch.arange(count, device=device) * stride for count in level.shape[-2:])
            centers = torch.stack([*torch.meshgrid(x, y, indexing="xy")] * 2, -1)
            boxes = centers[:, :, None] + self.generate_anchors(sizes, ratios, device=device)
            anchors.append(boxes.flatten(0, 2))
        return [torch.cat(anchors)] * len(image_list.image_sizes)


class SampledRows(NamedTuple):
    """Indices of the boxes of an image that a loss counts, each in rising order."""

    positive: Tensor
    negative: Tensor


class BoxSampler(BalancedPositiveNegativeSampler):
    """torchvision's random choice of boxes for one image, with the same random numbers."""

    @property
    def most_positive(self) -> int:
        """The largest number of positive boxes."""
        return int(self.batch_size_per_image * self.positive_fraction)

    def __call__(self, positive: Tensor, negative: Tensor) -> SampledRows:  # pyright: ignore[reportIncompatibleMethodOverride]
        """At most `batch_size_per_image` of N boxes, of which at most `positive_fraction` are positive.

        Args:
            positive: whether each box (N,) is positive.
            negative: whether each box (N,) is negative.
        """
        found = _drawn(positive, self.most_positive, self.most_positive)
        count = self.batch_size_per_image - len(found)
        return SampledRows(found, _drawn(negative, count, len(negative) - len(found)))


def _drawn(mask: Tensor, count: int, most: int) -> Tensor:
    """At most `count` random indices where a mask is true, of which there are at most `most`."""
    rows = chosen_rows(mask, most)
    return rows[torch.randperm(len(rows), device=rows.device)[:count]].sort().values


class OverlapMatcher:
    """An object for each box by intersection over union, as mmdetection's `MaxIoUAssigner`.

    Args:
        positive: from this overlap on, a box gets the object that it overlaps most.
        negative: below it, a box is background; between both, it does not count.
        low_quality: each object also gets the boxes that overlap it most, if they do so by this much. A later object
            wins over an earlier one.
    """

    def __init__(self, positive: float, negative: float, low_quality: float | None = None):
        self.positive, self.negative, self.low_quality = positive, negative, low_quality

    def __call__(self, objects: Tensor, boxes: Tensor) -> Tensor:
        """Objects (M, 4) and boxes (N, 4) to N indices of objects, `BACKGROUND` or `IGNORED_BOX`."""
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
    """torchvision's coder in float32 at least, with both bounds that mmdetection has for changes of a side."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Codes (N, 4 k) and boxes (N, 4) to k boxes for each, (N, 4 k)."""
        codes = rel_codes.to(torch.promote_types(rel_codes.dtype, torch.float32)).unflatten(1, (-1, 4))
        least = -self.bbox_xform_clip * codes.new_tensor(self.weights[2:])
        codes = torch.cat([codes[..., :2], codes[..., 2:].maximum(least)], -1)
        return super().decode_single(codes.flatten(1), boxes)
