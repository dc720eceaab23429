"""Conversion of targets to the format of DINO's predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torchvision.ops import box_convert

from vision.detection.training_targets import Target


class TargetBoxes(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (N, 4) as center, width and height, as fractions of the image.
        labels: (N,), from 0.
        sides: (4,), the width, height, width and height of the image in pixels.
    """

    boxes: Tensor
    labels: Tensor
    sides: Tensor


def target_boxes(targets: Sequence[Target]) -> list[TargetBoxes]:
    """Convert targets that were returned by `checked_targets`."""
    found = []
    for target in targets:
        height, width = target["image_size"]
        sides = target["boxes"].new_tensor([width, height, width, height])
        boxes = box_convert(target["boxes"] / sides, "xyxy", "cxcywh")
        found.append(TargetBoxes(boxes, target["labels"] - 1, sides))
    return found
