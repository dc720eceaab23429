"""timm's transforms of images for training and for validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor

from vision.config.data import ImagesConfig

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
    """timm's posterize, which also accepts 0 bits: strong policies use 0, and Pillow 13 refuses it instead of black."""
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
