"""Images of clouds, and common modifications of an image."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps


def picture(seed: int, width: int = 109, height: int = 97) -> Image.Image:
    """Return an image of clouds."""
    noise = np.random.default_rng(seed).integers(0, 256, (13, 11), np.uint8)
    soft = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    return ImageOps.autocontrast(soft.filter(ImageFilter.GaussianBlur(3)))


def recompressed(given: Image.Image) -> Image.Image:
    file = io.BytesIO()
    given.save(file, "JPEG", quality=40)
    return Image.open(file)


CHANGES = {
    "none": lambda given: given,
    "flip": ImageOps.mirror,
    "crop": lambda given: given.resize(given.size, Image.Resampling.BICUBIC, box=(2, 6, 103, 96)),
    "jpeg": recompressed,
    "brightness": lambda given: ImageEnhance.Brightness(given).enhance(0.7),
    "border": lambda given: ImageOps.expand(given, 7, 255).resize(given.size, Image.Resampling.BICUBIC),
    "size": lambda given: given.resize((211, 187), Image.Resampling.BICUBIC),
}
