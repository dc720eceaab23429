"""Masks of objects in COCO format: polygons, or run lengths along the columns of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from revnets.config.errors import ArgumentError
from vision.errors import run_error

MAX_OUTLINE = 25
"""Maximum length of an outline relative to height plus width of the image, because the time to draw it grows with
its length."""


class MaskError(ValueError):
    """An unusable mask. The message names the kind of mask, so that kinds can be counted."""


@dataclass(frozen=True, slots=True)
class Polygons:
    """A mask as polygons: arrays x, y, x, y, ... in pixels."""

    outlines: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A mask as run lengths: alternating counts of pixels outside and inside, along the columns of the image."""

    counts: np.ndarray


Segmentation = Polygons | RunLengths


def parse_segmentation(value: Any, height: int, width: int) -> Segmentation | None:
    """Parse the value of `segmentation` in a file; return None if it is empty.

    Args:
        value: The value in the file.
        height: Height of the image.
        width: Width of the image.

    Raises:
        MaskError: If the mask is damaged, belongs to an image of another size, or takes too long to draw.
    """
    if isinstance(value, Mapping):
        return _parse_run_lengths(value, height, width)
    if not isinstance(value, list):
        if value is None:
            return None
        raise MaskError("masks that are neither polygons nor run lengths")
    outlines = []
    for item in value:
        try:
            outline = np.array(item, np.float64)
        except (TypeError, ValueError, OverflowError):
            raise MaskError("damaged polygons") from None
        if outline.ndim != 1 or not np.isfinite(outline).all():
            raise MaskError("damaged polygons")
        if len(outline) >= 6 and len(outline) % 2 == 0:  # some tools write outlines without an area
            outlines.append(np.clip(outline, -max(height, width), 2.0 * max(height, width)))
    length = sum(np.abs(np.diff(points.reshape(-1, 2), axis=0, append=points[None, :2])).sum() for points in outlines)
    if length > MAX_OUTLINE * (height + width):
        raise MaskError("polygons whose outlines are too long")
    return Polygons(tuple(outlines)) if outlines else None


def _parse_run_lengths(value: Mapping[str, Any], height: int, width: int) -> RunLengths:
    size, counts = value.get("size"), value.get("counts")
    if size != [height, width]:
        raise MaskError("masks whose size differs from their images")
    if isinstance(counts, str):
        runs = _unpacked(counts)
    elif isinstance(counts, list) and all(type(count) is int and 0 <= count < 2**40 for count in counts):
        runs = np.array(counts, np.int64)
    else:
        raise MaskError("damaged run lengths")
    pixels = height * width
    is_bounded = len(runs) <= 2 * pixels and runs.min(initial=0) >= 0 and runs.max(initial=0) <= pixels
    if not is_bounded or runs.sum() != pixels:
        raise MaskError("damaged run lengths")
    return RunLengths(runs.astype(np.uint32))


def _unpacked(text: str) -> np.ndarray:
    """Decode COCO's run-length text: five bits per character; from the fourth number on, each is stored as the
    difference to the number two before it."""
    if not text.isascii():
        raise MaskError("damaged run lengths")
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise MaskError("damaged run lengths")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 8:  # 40 bits, more than any image has pixels
        raise MaskError("damaged run lengths")
    places = np.arange(len(codes)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((codes & 31) << (5 * places), starts)
    numbers -= np.where(codes[ends] & 16, np.int64(1) << (5 * sizes), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def dense_mask(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """Return the mask as an array (height, width) of uint8 with values 0 and 1.

    Raises:
        revnets.SpecError: If the mask consists of polygons, and faster-coco-eval is not installed.
    """
    if isinstance(segmentation, RunLengths):
        inside = np.arange(len(segmentation.counts)) % 2 == 1
        return np.repeat(inside, segmentation.counts).reshape(width, height).T.astype(np.uint8)
    api = mask_api()
    drawn = api.frPyObjects([list(points) for points in segmentation.outlines], height, width)
    return np.ascontiguousarray(api.decode(api.merge(drawn)))


def coco_segmentation(segmentation: Segmentation, height: int, width: int) -> list[list[float]] | dict[str, Any]:
    """Return the mask in the format of COCO's evaluation: polygons, or compressed run lengths."""
    if isinstance(segmentation, Polygons):
        return [points.tolist() for points in segmentation.outlines]
    plain = {"size": [height, width], "counts": segmentation.counts.tolist()}
    return mask_api().frPyObjects(plain, height, width)


def packed_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (H, W) of zeros and ones as COCO's compressed run lengths: `size`, and `counts` as text.

    Raises:
        ValueError: If the mask does not have two axes.
    """
    if mask.ndim != 2:
        raise ArgumentError(f"the mask has {mask.ndim} axes instead of two", "mask", code="shape-mismatch")
    found = mask_api().encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = found["counts"]
    return {"size": [int(side) for side in found["size"]], "counts": _text(counts)}


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def mask_api() -> Any:
    """Return the C++ mask functions of faster-coco-eval.

    Raises:
        revnets.SpecError: If faster-coco-eval is not installed.
    """
    try:
        import faster_coco_eval.core.mask as api
    except ImportError:
        raise missing_library() from None
    return api


def missing_library() -> Exception:
    """Return the error that faster-coco-eval is not installed."""
    hint = "Run pip install 'revnets[dense]'"
    return run_error("data", "faster-coco-eval is not installed", hint, code="missing-dependency")
