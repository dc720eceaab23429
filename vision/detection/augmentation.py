"""Augmentation of images with boxes and masks: DETR's multi-scale training, and the resizing for validation."""

from __future__ import annotations

from typing import Any

import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision import tv_tensors

from vision.config.data import CocoConfig
from vision.data.decoding import fitted_size

LONGEST = 7
"""Maximum ratio of the longer side to the shorter side before a crop (4200 to 600 in the release)."""

Target = dict[str, Tensor]
"""The objects of an image: `boxes` (N, 4), `labels` (N,), optional `masks` (N, H, W) and a `semantic_map` (H, W)."""


class MultiScaleAugmentation:
    """The training transforms of the release, which are those of DETR (Carion et al., ECCV 2020) and Sparse R-CNN.

    The image is mirrored with probability `hflip` and resized to a short side drawn from `short_sides`. With
    probability `crop` it is first resized to one of `crop_short_sides` and cropped, to sides drawn from the range
    `crop_sizes`. Objects whose box becomes smaller than one pixel are removed, possibly all of them.
    """

    def __init__(self, config: CocoConfig):
        self.config = config

    def __call__(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """Augment a uint8 image (3, H, W) together with the boxes and masks of its objects."""
        config = self.config
        parts = _Parts(image, target)
        if torch.rand(()) < config.hflip:
            parts.apply(TF.horizontal_flip)
        if torch.rand(()) < config.crop:
            side = _drawn(config.crop_short_sides)
            parts.resize(side, LONGEST * side)
            low, high = config.crop_sizes
            height, width = (_between(min(length, low), min(length, high)) for length in parts.size)
            top, left = (_between(0, length - part) for length, part in zip(parts.size, (height, width), strict=True))
            parts.apply(TF.crop, top, left, height, width)
        parts.resize(_drawn(config.short_sides), config.long_side)
        return normalized_pixels(parts.image, config), parts.sanitized()


def resized(image: Tensor, config: CocoConfig) -> Tensor:
    """Resize a uint8 image (3, H, W) for validation and normalize it."""
    size = list(fitted_size(image.shape[1:], config.val_short_side, config.long_side))
    return normalized_pixels(TF.resize(image, size, antialias=True), config)


def normalized_pixels(image: Tensor, config: CocoConfig) -> Tensor:
    """Convert a uint8 image (3, H, W) to normalized float values."""
    return TF.normalize(TF.to_dtype(image, scale=True), list(config.mean), list(config.std))


class _Parts:
    """An image with its boxes, masks and semantic map, which all get the same transforms."""

    def __init__(self, image: Tensor, target: Target):
        self.image, self.labels = image, target["labels"]
        boxes: Any = tv_tensors.BoundingBoxes  # its stub lacks the overload that is called
        self.boxes: Tensor = boxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:])
        self.layers = {name: target[name] for name in ("masks",) if name in target}
        if "semantic_map" in target:
            self.layers["semantic_map"] = target["semantic_map"][None]

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.image.shape[1:]
        return height, width

    def apply(self, change: Any, *args: Any) -> None:
        self.image, self.boxes = change(self.image, *args), change(self.boxes, *args)
        self.layers = {name: change(layer, *args) for name, layer in self.layers.items()}

    def resize(self, short_side: int, long_side: int) -> None:
        size = list(fitted_size(self.size, short_side, long_side))
        self.image = TF.resize(self.image, size, antialias=True)
        self.boxes = TF.clamp_bounding_boxes(TF.resize(self.boxes, size))  # rounding puts some slightly outside
        exact = TF.InterpolationMode.NEAREST_EXACT  # tv_tensors' own mode shifts masks by up to a pixel
        self.layers = {name: TF.resize(layer, size, interpolation=exact) for name, layer in self.layers.items()}

    def sanitized(self) -> Target:
        """Return the objects whose boxes have at least one pixel, as plain tensors."""
        boxes, keep = TF.sanitize_bounding_boxes(self.boxes, min_size=1)
        target = {"boxes": boxes.as_subclass(Tensor).float(), "labels": self.labels[keep]}
        if "masks" in self.layers:
            target["masks"] = self.layers["masks"][keep]
        if "semantic_map" in self.layers:
            target["semantic_map"] = self.layers["semantic_map"][0]
        return target


def _drawn(values: tuple[int, ...]) -> int:
    return values[int(torch.randint(len(values), ()))]


def _between(low: int, high: int) -> int:
    """Draw an integer from `low` to `high`, inclusive."""
    return int(torch.randint(low, high + 1, ()))
