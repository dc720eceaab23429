"""Region proposals (Ren et al., "Faster R-CNN", 2015) on torchvision's network, matched as mmdetection matches them."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import box_iou

from vision.detection.feature_pyramid import STRIDES
from vision.detection.training_targets import Target
from vision.models.recomputation import recomputed

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
        self.matcher = OverlapMatcher(0.7, 0.3, low_quality=0.3)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each image, 1 (object), 0 (background) or -1 (does not count) for each anchor, and the matched boxes."""
        labels, boxes = [], []
        for places, target in zip(anchors, targets, strict=True):
            height, width = target["image_size"]
            inside = (places[:, :2] >= 0).all(1) & (places[:, 2] < width) & (places[:, 3] < height)
            matches = torch.full_like(inside, IGNORED_BOX, dtype=torch.long)
            matches[inside] = self.matcher(target["boxes"], places[inside])
            labels.append(torch.where(matches >= 0, 1.0, torch.where(matches == BACKGROUND, 0.0, -1.0)))
            matched = torch.cat([target["boxes"], target["boxes"].new_zeros(2, 4)])[matches]
            boxes.append(torch.where(matches[:, None] >= 0, matched, places))
        return labels, boxes

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and boxes; 0 for images so small that no anchor lies inside of them."""
        if (torch.cat(labels) < 0).all():
            return objectness.sum() * 0, pred_bbox_deltas.sum() * 0
        return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)


class RecomputedProposalHead(RPNHead):
    """torchvision's convolutions, whose activations backward computes again."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return recomputed(super().forward, x)


class StridedAnchors(AnchorGenerator):
    """Anchors at the strides of the pyramid, with sides that are not rounded.

    torchvision's own divide the size of a padded batch by that of a map, which is no stride for stride 64.
    """

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
        dtype, device = torch.float32, feature_maps[0].device
        self.set_cell_anchors(dtype, device)
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in (*STRIDES, 64)]
        grids = self.grid_anchors([list(level.shape[-2:]) for level in feature_maps], strides)
        return [torch.cat(grids)] * len(image_list.image_sizes)


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
        matches[best < self.positive] = IGNORED_BOX
        matches[best < self.negative] = BACKGROUND
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
