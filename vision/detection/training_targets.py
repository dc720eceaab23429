"""Batching and validation of the images and targets of a detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import clip_boxes_to_image

from revnets.config.errors import ArgumentError, show
from vision.models.simulated_values import is_simulated, rows_where

Target = dict[str, Any]
"""Objects of an image: `boxes` (N, 4) as (left, top, right, bottom), `labels` (N,), `masks` (N, H, W) and others."""


def padded_batch(images: Sequence[Tensor], channels: int = 3, multiple: int = 32, least: int = 1) -> ImageList:
    """Batch images (C, H, W) of different sizes, padded with zeros on the right and at the bottom.

    Args:
        images: At least one image.
        channels: Expected number of channels C.
        multiple: Both sides of the batch are multiples of it.
        least: Minimum length of both sides.

    Raises:
        ValueError: If there are no images, or an image has another shape or an integer dtype.
    """
    if not all(isinstance(image, Tensor) for image in images):
        raise ArgumentError("images must be a list of tensors (C, H, W)", "images", code="wrong-type")
    shapes = [tuple(image.shape) for image in images]
    if not shapes or any(len(shape) != 3 or 0 in shape or shape[0] != channels for shape in shapes):
        problem = f"images must be a list of tensors ({channels}, H, W), but have the shapes {shapes[:3]}"
        raise ArgumentError(problem, "images", code="shape-mismatch")
    if not all(image.is_floating_point() for image in images):
        raise ArgumentError("images must be normalized float tensors, not integers", "images", code="wrong-type")
    sides = (max(least, *(shape[axis] for shape in shapes)) for axis in (1, 2))
    height, width = (-(-side // multiple) * multiple for side in sides)
    batch = images[0].new_zeros(len(images), shapes[0][0], height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return ImageList(batch, [(shape[1], shape[2]) for shape in shapes])


def checked_targets(
    images: Sequence[Tensor], targets: Sequence[Target] | None, num_classes: int, *, masks: bool = False
) -> list[Target]:
    """Validate targets, clip their boxes to the image, and drop boxes without an area.

    `image_size` (height, width) is added to each target.

    Args:
        images: (C, H, W) each.
        targets: One for each image.
        num_classes: Labels are 1 to this number.
        masks: Whether objects need masks.

    Raises:
        ValueError: If a target is missing or does not match its image; the error names it.
    """
    if targets is None or len(targets) != len(images):
        count = "no" if targets is None else len(targets)
        raise ArgumentError(f"there are {len(images)} images but {count} targets", "targets", code="wrong-length")
    return [
        _checked(number, image, target, num_classes, masks)
        for number, (image, target) in enumerate(zip(images, targets, strict=True))
    ]


def _checked(number: int, image: Tensor, target: Target, num_classes: int, masks: bool) -> Target:
    if not isinstance(target, Mapping):
        problem = f"target {number} is {show(target)}, not a mapping"
        raise ArgumentError(problem, f"targets.{number}", code="wrong-type")
    names = ["boxes", "labels", *(["masks"] if masks else [])]
    for name in names:
        if not isinstance(target.get(name), Tensor):
            raise _target_error(number, name, "is missing", "missing-key")
    boxes, labels = target["boxes"], target["labels"].long()
    if not is_simulated(boxes):  # a fake tensor cannot change its class in PyTorch 2.8
        boxes = boxes.as_subclass(Tensor)
    boxes = boxes.float()
    if boxes.ndim != 2 or boxes.shape[-1] != 4:
        raise _target_error(number, "boxes", f"has the shape {tuple(boxes.shape)}, not (N, 4)", "shape-mismatch")
    if labels.shape != boxes.shape[:1]:
        problem = f"has the shape {tuple(labels.shape)}, not ({len(boxes)},)"
        raise _target_error(number, "labels", problem, "shape-mismatch")
    if len(labels) and (target["labels"].is_floating_point() or target["labels"].is_complex()):
        raise _target_error(number, "labels", f"has dtype {target['labels'].dtype}, not an integer type", "wrong-type")
    height, width = image.shape[-2:]
    size = (height, width)
    if masks and target["masks"].shape != (len(boxes), *size):
        found, expected = tuple(target["masks"].shape), (len(boxes), *size)
        raise _target_error(number, "masks", f"has the shape {found}, not {expected}", "shape-mismatch")
    if not is_simulated(boxes):
        _check_values(number, boxes, labels, target["masks"] if masks else None, num_classes)
    boxes = clip_boxes_to_image(boxes, size)
    kept = rows_where((boxes[:, 2:] > boxes[:, :2]).all(1), len(boxes))
    objects = {**target, "boxes": boxes, "labels": labels}
    return {**objects, "image_size": size, **{name: objects[name][kept] for name in names}}


def _check_values(number: int, boxes: Tensor, labels: Tensor, masks: Tensor | None, num_classes: int) -> None:
    for name, values in (("boxes", boxes), ("masks", masks)):
        if values is not None and values.is_floating_point() and not torch.isfinite(values).all():
            raise _target_error(number, name, "has values that are not finite", "not-finite")
    if len(boxes) and not 1 <= int(labels.min()) <= int(labels.max()) <= num_classes:
        found = sorted({int(labels.min()), int(labels.max())})
        raise _target_error(number, "labels", f"has {found}, outside the range 1 to {num_classes}", "out-of-range")


def _target_error(number: int, name: str, problem: str, code: str) -> ArgumentError:
    return ArgumentError(f"target {number}: {name} {problem}", f"targets.{number}.{name}", code=code)


def semantic_maps(targets: Sequence[Target], num_classes: int, size: tuple[int, int], stride: int) -> Tensor:
    """Return the semantic maps of a batch at every `stride`-th pixel, (B, *size), with 255 outside the images.

    Args:
        targets: With `semantic_map` and `image_size`.
        num_classes: Number of classes of the maps.
        size: Height and width of the result.
        stride: Distance of the pixels that are used.

    Raises:
        ValueError: If a map is missing, its size differs from that of its image, or a class is out of range.
    """
    goals = []
    for number, target in enumerate(targets):
        classes = target.get("semantic_map")
        if not isinstance(classes, Tensor):
            raise _target_error(number, "semantic_map", "is missing", "missing-key")
        if tuple(classes.shape) != target["image_size"]:
            found, expected = tuple(classes.shape), target["image_size"]
            raise _target_error(number, "semantic_map", f"has the shape {found}, not {expected}", "shape-mismatch")
        wrong = (classes < 0) | ((classes >= num_classes) & (classes != 255))
        if not is_simulated(classes) and wrong.any():
            problem = f"has classes outside the range 0 to {num_classes - 1}"
            raise _target_error(number, "semantic_map", problem, "out-of-range")
        part = classes[::stride, ::stride].long()
        goals.append(F.pad(part, (0, size[1] - part.shape[1], 0, size[0] - part.shape[0]), value=255))
    return torch.stack(goals)
