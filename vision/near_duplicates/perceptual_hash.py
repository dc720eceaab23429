"""Perceptual hashes of an image and of its typical variants: mirrored, cropped, with or without a border.

A hash has the signs of the 16 x 16 lowest frequencies of an image about their median (Zauner, "Implementation and
Benchmarking of Perceptual Image Hash Functions", 2010; the package `imagehash`). Recompression and brightness change
few of these 256 bits. Moving pixels changes many, so every variant of an image has its own hash.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageOps

from revnets.config.errors import ConfigError

SIDE, WORDS = 16, 4
BITS = SIDE**2

LONG_SIDE = 128
"""Length of the long side in pixels, which is enough for these frequencies."""

BORDER = 16
"""Largest deviation of the gray values of a border from their median."""

OUTER = ((1.0, 0.5, 0.5), (0.93, 0.5, 0.5), (0.87, 0.5, 0.5))
"""Size and position of the sections of a possible copy, which omit a border that may have been added."""

INNER = (
    (1.0, 0.5, 0.5),
    *((0.95, x, y) for x, y in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))),
    *((0.9, x, y) for x in (0, 0.5, 1) for y in (0, 0.5, 1)),
)
"""Size and position of the sections of a possible original, from which a copy may have been cropped."""

COPIES, ORIGINALS = len(OUTER) + 1, 2 * (len(INNER) + 1)
"""Number of hashes of each image."""


def small(picture: Image.Image) -> Image.Image:
    """A gray image whose long side has at most `LONG_SIDE` pixels."""
    gray = picture.convert("L")
    gray.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.BOX)
    return gray


def hashes_of_copy(picture: Image.Image) -> np.ndarray:
    """Hashes of a possible copy: of its sections, and of the image without its border; (versions, 4), uint64."""
    gray = small(picture)
    return np.stack([_hash(version) for version in (*(section(gray, *place) for place in OUTER), trimmed(gray))])


def hashes_of_original(picture: Image.Image) -> np.ndarray:
    """Hashes of a possible original: of its sections, unchanged and mirrored; (versions, 4), uint64."""
    gray = small(picture)
    versions = [*(section(gray, *place) for place in INNER), trimmed(gray)]
    return np.stack([_hash(version) for version in (*versions, *map(ImageOps.mirror, versions))])


def bits_apart(copies: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """The number of bits, of 256, in which the closest versions of each pair differ.

    Every section of the original is compared with the whole copy, and every version of the copy with the whole and the
    trimmed original.

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
    """A section of an image, resized to the size of the image.

    Args:
        picture: The image.
        size: Of the section, as a fraction of the sides.
        x, y: position, from 0 (left, top) to 1 (right, bottom).
    """
    if size == 1:
        return picture
    width, height = picture.size
    left, top = x * width * (1 - size), y * height * (1 - size)
    box = (left, top, left + size * width, top + size * height)
    return picture.resize(picture.size, Image.Resampling.BILINEAR, box=box)


def trimmed(picture: Image.Image) -> Image.Image:
    """A gray image without its uniform border, or the image itself if too little would remain."""
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
        remedy = "pip install 'revnets[duplicates]', or omit --images to compare labels only"
        raise ConfigError("environment", "imagehash", "is not installed", remedy, code="missing-dependency") from None
    return imagehash
