"""Copy-paste augmentation (Ghiasi et al., "Simple Copy-Paste", CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import masks_to_boxes

from revnets.config.errors import ArgumentError
from vision.detection.training_targets import Target

OBJECT_KEYS = ("boxes", "labels", "masks", "area", "iscrowd")
"""Keys of a target whose values have one item for each object."""

IMAGE_KEYS = ("semantic_map", "image_id", "size", "orig_size", "image_size")


class CopyPaste:
    """Cuts objects out of each image along their masks and pastes them into the previous image of the batch.

    It replaces InstaBoost, which Swin Transformer's recipe of HTC++ uses. Pasted objects keep their position. Occluded
    objects get new masks and boxes, and are dropped if too few of their pixels stay visible.

    Args:
        probability: Probability that an image gets objects.
        least_pixels: Objects with fewer visible pixels are dropped.
    """

    def __init__(self, probability: float = 0.5, least_pixels: int = 16):
        self.probability, self.least_pixels = probability, least_pixels

    def __call__(
        self, images: Sequence[Tensor], targets: Sequence[Target], generator: torch.Generator | None = None
    ) -> tuple[list[Tensor], list[Target]]:
        """Return images and targets with pasted objects. The arguments are not modified.

        Args:
            images: (C, H, W) each, of any sizes. Objects are cut off at the border of the other image.
            targets: With `boxes`, `labels`, `masks` (N, H, W), and optional `semantic_map` (H, W), `area` and
                `iscrowd` (N,).
            generator: Random number generator.
        """
        pasted = []
        for index, (image, target) in enumerate(zip(images, targets, strict=True)):
            other = (index + 1) % len(images)
            chosen = torch.rand(len(targets[other]["labels"]), generator=generator) < 0.5
            if other == index or torch.rand((), generator=generator) >= self.probability:
                chosen[:] = False
            pasted.append(paste_objects(image, target, images[other], targets[other], chosen, self.least_pixels))
        return [image for image, _ in pasted], [target for _, target in pasted]


def paste_objects(
    image: Tensor, target: Target, source: Tensor, source_target: Target, chosen: Tensor, least_pixels: int = 16
) -> tuple[Tensor, Target]:
    """Paste the chosen objects of one image in front of those of another.

    Args:
        image: Image (C, H, W) to paste into.
        target: Its objects.
        source: Image (C, H', W') to paste from.
        source_target: Its objects.
        chosen: Booleans, one for each object of `source_target`.
        least_pixels: Objects with fewer visible pixels are dropped.

    Raises:
        ValueError: If only one target has `area` or `iscrowd`, or a target has tensors under unknown keys.
    """
    others = _others_of_objects(target, source_target)
    rows = chosen.nonzero().squeeze(1).to(source_target["labels"].device)
    if not len(rows):
        return image, target
    height, width = (min(image.shape[axis], source.shape[axis]) for axis in (1, 2))
    masks = target["masks"].new_zeros(len(rows), *image.shape[1:])
    masks[:, :height, :width] = source_target["masks"][rows, :height, :width]
    front = masks.amax(0).bool()
    image = image.clone()
    window = front[:height, :width]
    image[:, :height, :width] = torch.where(window, source[:, :height, :width], image[:, :height, :width])

    behind = target["masks"] * ~front
    masks = torch.cat([behind, masks])
    pixels = (masks > 0).flatten(1).sum(1)
    kept = pixels >= least_pixels
    unchanged = torch.zeros_like(kept)
    unchanged[: len(behind)] = (behind == target["masks"]).flatten(1).all(1)
    kept |= unchanged
    boxes = torch.cat([target["boxes"], source_target["boxes"][rows]])
    redrawn = kept & ~unchanged
    boxes[redrawn] = pixel_boxes(masks[redrawn]).to(boxes.dtype)
    labels = torch.cat([target["labels"], source_target["labels"][rows]])
    result = {**target, "boxes": boxes[kept], "labels": labels[kept], "masks": masks[kept]}
    for name in others:
        values = torch.cat([target[name], source_target[name][rows]])
        if name == "area":
            values[redrawn] = pixels[redrawn].to(values.dtype)
        result[name] = values[kept]
    if "semantic_map" in target:
        classes = target["semantic_map"].clone()
        other = source_target.get("semantic_map")
        values = torch.full_like(classes, 255)
        if other is not None:
            values[:height, :width] = other[:height, :width]
        result["semantic_map"] = torch.where(front, values, classes)
    return image, result


def _others_of_objects(target: Target, source_target: Target) -> list[str]:
    """Return the optional keys of both targets that have one item for each object.

    Raises:
        ValueError: If only one target has such a key, or a target has a tensor under an unknown key.
    """
    for part in (target, source_target):
        for name, value in part.items():
            if isinstance(value, Tensor) and value.ndim and name not in (*OBJECT_KEYS, *IMAGE_KEYS):
                problem = f"copy-paste does not support the key {name!r}. Remove it from the targets"
                raise ArgumentError(problem, f"targets.{name}", code="unknown-key")
    others = [name for name in ("area", "iscrowd") if name in target or name in source_target]
    for name in others:
        if name not in target or name not in source_target:
            raise ArgumentError(f"only one of two targets has {name!r}", f"targets.{name}", code="missing-key")
    return others


def pixel_boxes(masks: Tensor) -> Tensor:
    """Return the bounding boxes (N, 4) of masks (N, H, W), each of which has at least one pixel."""
    boxes = masks_to_boxes(masks)
    boxes[:, 2:] += 1  # torchvision returns the last pixel, not the edge after it
    return boxes
