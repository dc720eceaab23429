"""Hungarian matching: the assignment of queries to objects with the least cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_convert

from vision.detection.box_losses import giou_losses
from vision.detection.dino_detr.deformable_transformer import ScoredBoxes
from vision.detection.dino_detr.target_boxes import TargetBoxes
from vision.models.simulated_values import assigned_pairs

CLASS_COST, BOX_COST, GIOU_COST = 2.0, 5.0, 2.0
ALPHA, GAMMA = 0.25, 2.0
"""Parameters of the focal loss (Lin et al., ICCV 2017)."""


class Pairs(NamedTuple):
    """Indices (P,) of queries and of the objects that are assigned to them."""

    queries: Tensor
    objects: Tensor


@torch.no_grad()
def hungarian_pairs(predicted: ScoredBoxes, objects: Sequence[TargetBoxes]) -> list[Pairs]:
    """Return the min(Q, N) pairs of a query and an object with the least total cost, for each image.

    The cost is that of DETR (Carion et al., ECCV 2020) with a focal class cost. The weights are 2 for the class, 5 for
    the L1 distance of boxes as fractions of the image, and 2 for their generalized IoU.
    """
    scores, boxes = predicted.scores.float(), predicted.boxes.float()
    return [_pairs(*item) for item in zip(scores, boxes, objects, strict=True)]


def _pairs(scores: Tensor, boxes: Tensor, item: TargetBoxes) -> Pairs:
    shape = (len(boxes), len(item.boxes), 4)
    giou_loss = giou_losses(
        in_pixels(boxes, item.sides)[:, None].expand(shape), in_pixels(item.boxes, item.sides).expand(shape)
    )
    distance = torch.cdist(boxes, item.boxes, p=1)
    cost = CLASS_COST * _class_cost(scores)[:, item.labels] + BOX_COST * distance + GIOU_COST * giou_loss
    cost = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)  # if the model has diverged; the trainer reports its loss
    return Pairs(*assigned_pairs(cost))


def _class_cost(logits: Tensor) -> Tensor:
    """Return the focal cost of predicting a class minus that of not predicting it."""
    p, eps = logits.sigmoid(), 1e-12
    positive = -(p + eps).log() * ALPHA * (1 - p) ** GAMMA
    return positive + (1 - p + eps).log() * (1 - ALPHA) * p**GAMMA


def in_pixels(boxes: Tensor, sides: Tensor) -> Tensor:
    """Convert boxes from center, width and height as fractions of the image to x1, y1, x2, y2 in pixels."""
    return box_convert(boxes, "cxcywh", "xyxy") * sides
