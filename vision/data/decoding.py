"""From the bytes of an image to pixels of eight bits: one way for training, evaluation and analyses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import IO, Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

Exif = Literal["ignore", "apply"]

SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose greyscale has 16 bits at most, although versions of Pillow open it in the mode of 32 bits."""


GREY_STEPS = {"L;2": 85, "L;4": 17}
"""Pillow spreads the grey values of pictures of 2 and 4 bits over 0 to 255, by these factors."""

LARGE, PACKED = 2**26, 50
"""Pixels of a picture that takes long to decode, and how many a byte of its file may hold then; of photos, 2 to 30."""


def read_image(file: IO[bytes], mode: str = "RGB", exif: Exif = "ignore") -> Image.Image:
    """The first picture of a file, whatever its extension.

    Args:
        file: opened; needed no more afterwards.
        mode, exif: as for `converted`.

    Raises:
        Exception: it cannot be decoded; decoders raise whatever they like (OSError, SyntaxError, ValueError,
            DecompressionBombError).
    """
    picture = _opened(file)
    picture.load()
    return converted(picture, mode, exif)


def read_semantic_map(file: IO[bytes]) -> np.ndarray:
    """The class number of every pixel of a picture: its grey values, or the indices of its palette.

    Args:
        file: opened; needed no more afterwards.

    Returns:
        (H, W), integers.

    Raises:
        Exception: it cannot be decoded, or its pixels are colors.
    """
    picture = _opened(file)
    tiles: Any = getattr(picture, "tile", ())  # (decoder, box, offset, layout of the bits)
    step = next((GREY_STEPS[str(tile[3])] for tile in tiles if str(tile[3]) in GREY_STEPS), 1)
    picture.load()
    if picture.mode not in ("1", "L", "P", "I;16", "I;16B", "I"):
        raise ValueError(f"its pixels are colors (mode {picture.mode}) where class numbers are needed")
    return np.asarray(picture).astype(np.int64) // step


def _opened(file: IO[bytes]) -> Image.Image:
    try:
        picture = Image.open(file, formats=_formats())
    except UnidentifiedImageError:  # whose message is a description of the object `file`
        raise OSError("cannot identify a picture in it") from None
    _require_real_size(picture, file)
    return picture


def converted(picture: Image.Image, mode: str = "RGB", exif: Exif = "ignore") -> Image.Image:
    """A picture of any mode in one of eight bits a channel.

    Of 16 bits the upper eight stay. Transparency is dropped, as timm and torchvision do it: colors are those that the
    file has below it.

    Args:
        mode: `RGB` or `L`.
        exif: `apply` turns and mirrors a picture as its EXIF orientation says; `ignore` leaves it as it is stored.

    Raises:
        ValueError: its numbers have no scale: integers of 32 bits, or floats.
    """
    has_16_bits = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in SIXTEEN_BITS)
    if exif == "apply":
        picture = _upright(picture)  # which does not keep the format
    if has_16_bits:
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"its pixels are numbers of 32 bits (mode {picture.mode}), which have no scale")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # the same colors; Pillow warns about any other way
    return picture if picture.mode == mode else picture.convert(mode)


def fitted_size(size: Sequence[int], short_side: int, long_side: int) -> tuple[int, int]:
    """The largest height and width in the proportion of `size` whose sides do not exceed these two."""
    height, width = size
    factor = min(short_side / min(size), long_side / max(size))
    return max(1, round(height * factor)), max(1, round(width * factor))


def _require_real_size(picture: Image.Image, file: IO[bytes]) -> None:
    """Refuse what Pillow's own limit of 179 million pixels lets pass: it would fill 2 GB."""
    place = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(place)
    if picture.width * picture.height > max(LARGE, PACKED * size):
        raise ValueError(f"{size} bytes would be unpacked to {picture.width} x {picture.height} pixels")


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # the picture is right, its EXIF data are damaged
        return picture


@cache
def _formats() -> tuple[str, ...]:
    """Those that Pillow reads by itself: for EPS it runs Ghostscript, and a file's name does not tell its format."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")
