"""Perceptual hashes of a picture and of what people make of it: mirrored, cropped, with or without a border.

A hash is the signs of the 16 x 16 lowest frequencies of a picture about their median (Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010; the package `imagehash`): 256 bits, of which recompression and
brightness change few. What moves pixels changes many, so every version of a picture has a hash of its own.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageOps

from revnets.config.errors import ConfigError

SIDE, WORDS = 16, 4
BITS = SIDE**2

LONG_SIDE = 128
"""Pixels that are enough for these frequencies."""

BORDER = 16
"""How far gray values of a border may be from each other."""

OUTER = ((1.0, 0.5, 0.5), (0.93, 0.5, 0.5), (0.87, 0.5, 0.5))
"""Size and place of the sections of a labeled image: without a border that was put around another one."""

INNER = (
    (1.0, 0.5, 0.5),
    *((0.95, x, y) for x, y in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))),
    *((0.9, x, y) for x in (0, 0.5, 1) for y in (0, 0.5, 1)),
)
"""Sections of the image that it may have been made from."""


COPIES, ORIGINALS = len(OUTER) + 1, 2 * (len(INNER) + 1)
"""Hashes of each image."""


def small(picture: Image.Image) -> Image.Image:
    """A picture in gray whose long side has at most `LONG_SIDE` pixels."""
    gray = picture.convert("L")
    gray.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.BOX)
    return gray


def hashes_of_copy(picture: Image.Image) -> np.ndarray:
    """Hashes of an image that may be a copy: of sections, and of what is inside of borders; (versions, 4), uint64."""
    gray = small(picture)
    return np.stack([_hash(version) for version in (*(section(gray, *place) for place in OUTER), trimmed(gray))])


def hashes_of_original(picture: Image.Image) -> np.ndarray:
    """Hashes of an image that may have been copied: of sections, as it is and mirrored; (versions, 4), uint64."""
    gray = small(picture)
    versions = [*(section(gray, *place) for place in INNER), trimmed(gray)]
    return np.stack([_hash(version) for version in (*versions, *map(ImageOps.mirror, versions))])


def bits_apart(copies: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """In how many of 256 bits the nearest versions of each pair differ.

    Every section of the original is compared with the whole copy, and every version of the copy with the whole and
    the trimmed original.

    Args:
        copies: (pairs, versions, 4), of `hashes_of_copy`.
        originals: (pairs, versions, 4), of `hashes_of_original`.
    """
    half = originals.shape[1] // 2
    found = np.full(len(copies), BITS, np.int64)
    for left, right in (
        (copies[:, :1], originals),
        (copies[:, 1:], originals[:, [0, half - 1, half, 2 * half - 1]]),
    ):
        for version in range(left.shape[1]):
            apart = np.bitwise_count(left[:, version, None] ^ right).sum(-1, dtype=np.int64)
            np.minimum(found, apart.min(1), out=found)
    return found


def section(picture: Image.Image, size: float, x: float, y: float) -> Image.Image:
    """A part of a picture, enlarged to its size.

    Args:
        size: of the part, as a fraction of the sides.
        x, y: where it is, from 0 (left, top) to 1 (right, bottom).
    """
    if size == 1:
        return picture
    width, height = picture.size
    left, top = x * width * (1 - size), y * height * (1 - size)
    box = (left, top, left + size * width, top + size * height)
    return picture.resize(picture.size, Image.Resampling.BILINEAR, box=box)


def trimmed(picture: Image.Image) -> Image.Image:
    """A gray picture without a border of one color, or the picture itself if nothing would be left."""
    pixels = np.asarray(picture).astype(np.int64)
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    inside = np.abs(pixels - np.median(edge)) > BORDER
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if len(rows) < SIDE // 2 or len(columns) < SIDE // 2:
        return picture
    return picture.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def _hash(picture: Image.Image) -> np.ndarray:
    bits = _imagehash().phash(picture, hash_size=SIDE).hash
    return np.packbits(bits).view(np.uint64)


@cache
def _imagehash():
    try:
        import imagehash
    except ImportError:
        remedy = "pip install 'revnets[duplicates]', or compare labels alone: leave out --images"
        raise ConfigError("environment", "imagehash", "is not installed", remedy, code="missing-dependency") from None
    return imagehash
