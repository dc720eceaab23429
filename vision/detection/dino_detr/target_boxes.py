"""The objects of images as DINO compares them with its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torchvision.ops import box_convert

from revnets.config.errors import ArgumentError


class TargetBoxes(NamedTuple):
    """The objects of an image.

    Attributes:
        boxes: (N, 4), center, width and height as fractions of the image.
        labels: (N,), from 0.
        sides: (4,), width, height, width, height of the image in pixels.
    """

    boxes: Tensor
    labels: Tensor
    sides: Tensor


def target_boxes(
    targets: Sequence[Mapping[str, Any]], sizes: Sequence[tuple[int, int]], num_classes: int
) -> list[TargetBoxes]:
    """The objects that a detector is trained with.

    Args:
        targets: for each image, `boxes` (N, 4) x1, y1, x2, y2 in pixels and `labels` (N,) from 1 to `num_classes`.
        sizes: height and width of the images.
        num_classes: without background.

    Raises:
        ValueError: targets are missing, of other sizes, or outside of their ranges.
    """
    if len(targets) != len(sizes):
        raise _refusal(f"{len(targets)} targets for {len(sizes)} images", "", "wrong-length")
    found = []
    for number, (target, (height, width)) in enumerate(zip(targets, sizes, strict=True)):
        missing = {"boxes", "labels"} - set(target)
        if missing:
            raise _refusal(f"has no {' and no '.join(sorted(missing))}", f"[{number}]", "missing-key")
        boxes, labels = target["boxes"].float(), target["labels"].long()
        _check(boxes, labels, num_classes, number)
        sides = boxes.new_tensor([width, height, width, height])
        found.append(TargetBoxes(box_convert(boxes / sides, "xyxy", "cxcywh"), labels - 1, sides))
    return found


def has_values(tensor: Tensor) -> bool:
    """False for the tensors of a simulated step, which have shapes alone."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def _check(boxes: Tensor, labels: Tensor, num_classes: int, number: int) -> None:
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        shapes = f"boxes {tuple(boxes.shape)} and labels {tuple(labels.shape)}"
        raise _refusal(f"{shapes}; give (N, 4) and (N,)", f"[{number}]", "shape-mismatch")
    if not len(boxes) or not has_values(boxes):
        return
    if not bool(boxes.isfinite().all()):
        raise _refusal("a box is not finite", f"[{number}].boxes", "not-finite")
    if not bool((boxes[:, 2:] >= boxes[:, :2]).all()):
        problem = "a box ends before it begins; give x1, y1, x2, y2 in pixels"
        raise _refusal(problem, f"[{number}].boxes", "invalid-value")
    least, most = (int(value) for value in torch.aminmax(labels))
    if least < 1 or most > num_classes:
        problem = f"labels from {least} to {most}; this detector has 1 to {num_classes}"
        raise _refusal(problem, f"[{number}].labels", "out-of-range")


def _refusal(problem: str, place: str, code: str) -> ArgumentError:
    key = f"targets{place}"
    return ArgumentError(f"{key}: {problem}", key, code=code)
