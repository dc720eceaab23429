"""Decoding of image files to 8-bit pixels, shared by training, evaluation and analyses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Exif = Literal["ignore", "apply"]

SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose grayscale has at most 16 bits, although some versions of Pillow open it in a 32-bit mode."""

GRAY_STEPS = {"L;2": 85, "L;4": 17}
"""Factors by which Pillow scales the gray values of 2-bit and 4-bit images to 0 ... 255."""

LARGE, PACKED = 2**26, 50
"""Pixels above which the size of an image is compared with its file, and the most pixels per byte then.

Photos have 2 to 30 pixels per byte.
"""


def read_image(file: IO[bytes], mode: str = "RGB", exif: Exif = "ignore") -> Image.Image:
    """Decode the first image of a file. The format is recognized by the content.

    Args:
        file: An open file, which is not needed afterwards.
        mode, exif: as for `converted`.

    Raises:
        Exception: If the image cannot be decoded. Decoders raise errors of many types, such as OSError, SyntaxError,
            ValueError and DecompressionBombError.
    """
    picture = _opened(file)
    picture.load()
    return converted(picture, mode, exif)


def read_semantic_map(file: IO[bytes]) -> np.ndarray:
    """Decode a semantic map: the class number of every pixel is its gray value or the index in its palette.

    Args:
        file: An open file, which is not needed afterwards.

    Returns:
        Integers (H, W).

    Raises:
        Exception: If the map cannot be decoded, or its pixels are colors.
    """
    picture = _opened(file)
    tiles: Any = getattr(picture, "tile", ())  # (decoder, box, offset, layout of the bits)
    step = next((GRAY_STEPS[str(tile[3])] for tile in tiles if str(tile[3]) in GRAY_STEPS), 1)
    picture.load()
    if picture.mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
        raise ValueError(f"its pixels are colors (mode {picture.mode}), not class numbers")
    return np.asarray(picture).astype(np.int64) // step


def _opened(file: IO[bytes]) -> Image.Image:
    try:
        picture = Image.open(file, formats=_formats())
    except UnidentifiedImageError:  # whose message is a description of the object `file`
        raise OSError("not an image of a known format") from None
    _require_real_size(picture, file)
    return picture


def converted(picture: Image.Image, mode: str = "RGB", exif: Exif = "ignore") -> Image.Image:
    """Convert an image of any mode to eight bits per channel.

    16-bit values keep their upper eight bits. The alpha channel is dropped without blending, as in timm and
    torchvision.

    Args:
        mode: `RGB` or `L`.
        exif: `apply` rotates and mirrors the image by its EXIF orientation; `ignore` keeps it as stored.

    Raises:
        ValueError: If the pixels are 32-bit integers or floats, which have no defined scale.
    """
    has_16_bits = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in SIXTEEN_BITS)
    if exif == "apply":
        picture = _upright(picture)  # which does not keep the format
    if has_16_bits:
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are 32-bit numbers (mode {picture.mode}), which have no defined scale")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # the same colors, and Pillow does not warn
    return picture if picture.mode == mode else picture.convert(mode)


def fitted_size(size: Sequence[int], short_side: int, long_side: int) -> tuple[int, int]:
    """The largest height and width with the aspect ratio of `size` whose sides do not exceed these limits."""
    height, width = size
    factor = min(short_side / min(size), long_side / max(size))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _require_real_size(picture: Image.Image, file: IO[bytes]) -> None:
    """Refuse images of a tiny file that decode to large ones; Pillow's own limit of 179 million pixels allows 2 GB."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    if picture.width * picture.height > max(LARGE, PACKED * size):
        raise ValueError(f"{size} bytes would decode to {picture.width} x {picture.height} pixels")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # only the EXIF data is damaged
        return picture


@cache
def _formats() -> tuple[str, ...]:
    """All formats of Pillow except EPS, which runs Ghostscript. A file name does not fix the format."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")
