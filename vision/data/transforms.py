"""Transforms of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor

from vision.config.data import ImagesConfig, SmallImagesConfig
from vision.data.samplers import Key

Transform = Callable[[Image.Image], Tensor]


def train_transform(config: ImagesConfig) -> Transform:
    """timm's transform for training."""
    augment = config.augment.model_dump()
    transform: Any = create_transform(config.img_size, is_training=True, mean=config.mean, std=config.std, **augment)
    for step in transform.transforms:
        policies = [getattr(step, "ops", ()), *getattr(step, "policy", ())]  # of RandAugment, of AutoAugment
        for operation in (operation for operations in policies for operation in operations):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """timm's, also for no bits at all: strong policies ask for that, and Pillow 13 refuses what used to give black."""
    return auto_augment.posterize(image, bits_to_keep, **options) if bits_to_keep > 0 else image.point(lambda _: 0)


def val_transform(config: ImagesConfig) -> Transform:
    """timm's transform for validation."""
    return create_transform(
        config.img_size,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
        crop_pct=config.crop_pct,
        crop_mode=config.crop_mode,
    )  # pyright: ignore[reportReturnType]


def scaled(images: Tensor) -> Tensor:
    """Bytes as numbers in [0, 1]; floats as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class RandomAffine:
    """A random rotation, change of size, shift and mirroring of every image, drawn from (seed, epoch, index)."""

    def __init__(self, config: SmallImagesConfig, seed: int):
        self.limits = np.array([math.radians(config.rotate), config.scale, config.shift, config.shift])
        self.hflip, self.seed = config.hflip, seed

    def __call__(self, images: Tensor, keys: Sequence[Key]) -> Tensor:
        """Images (B, C, H, W) in, images of that shape out; what comes in from outside is black."""
        if not self.limits.any() and not self.hflip:
            return images
        generators = [np.random.default_rng((self.seed, *key)) for key in keys]
        draws = np.stack([generator.uniform(-1, 1, 4) for generator in generators]) * self.limits
        angle, growth, right, down = torch.from_numpy(draws).float().unbind(1)
        mirrored = torch.tensor([generator.random() < self.hflip for generator in generators])
        cos, sin = angle.cos() / (1 + growth), angle.sin() / (1 + growth)
        # affine_grid maps the result's coordinates, from -1 to 1 over the image, to the source's.
        matrix = torch.stack([cos, -sin, 2 * right, sin, cos, 2 * down], dim=1).view(-1, 2, 3)
        matrix[mirrored, 0] *= -1
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)
