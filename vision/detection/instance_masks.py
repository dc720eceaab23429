"""Masks of objects as COCO writes them: polygons, or run lengths down the columns of an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from revnets.config.errors import ArgumentError
from vision.errors import run_error

MAX_OUTLINE = 25
"""Pixels along the outline of a polygon for each pixel of the sides of its image: drawing takes time for each."""


class MaskError(ValueError):
    """A mask that cannot be used. Its text says of what kind it is, for counting."""


@dataclass(frozen=True, slots=True)
class Polygons:
    """A mask by its outlines: arrays x, y, x, y, ... in pixels."""

    outlines: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class RunLengths:
    """A mask by the numbers of pixels outside and inside of it by turns, down the columns of the image."""

    counts: np.ndarray


Segmentation = Polygons | RunLengths


def parse_segmentation(value: Any, height: int, width: int) -> Segmentation | None:
    """The value of `segmentation` in a file, for an image of this size; None if it is empty.

    Raises:
        MaskError: it is damaged, of an image of another size, or cannot be drawn in reasonable time.
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
        if len(outline) >= 6 and len(outline) % 2 == 0:  # others, which some tools write, have no area
            outlines.append(np.clip(outline, -max(height, width), 2.0 * max(height, width)))
    length = sum(np.abs(np.diff(points.reshape(-1, 2), axis=0, append=points[None, :2])).sum() for points in outlines)
    if length > MAX_OUTLINE * (height + width):
        raise MaskError("polygons whose outlines are too long")
    return Polygons(tuple(outlines)) if outlines else None


def _parse_run_lengths(value: Mapping[str, Any], height: int, width: int) -> RunLengths:
    size, counts = value.get("size"), value.get("counts")
    if size != [height, width]:
        raise MaskError("masks of another size than their images")
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
    """Run lengths out of COCO's text: groups of five bits a character, each number as the difference to the last but
    one from the fourth on."""
    if not text.isascii():
        raise MaskError("damaged run lengths")
    codes = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(codes & 32 == 0)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or not len(ends) or ends[-1] != len(codes) - 1:
        raise MaskError("damaged run lengths")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 8:  # 40 bits, more than pixels of any image
        raise MaskError("damaged run lengths")
    places = np.arange(len(codes)) - np.repeat(starts, sizes)
    numbers = np.add.reduceat((codes & 31) << (5 * places), starts)
    numbers -= np.where(codes[ends] & 16, np.int64(1) << (5 * sizes), 0)
    for first in (1, 2):
        numbers[first::2] = np.cumsum(numbers[first::2])
    return numbers


def dense_mask(segmentation: Segmentation, height: int, width: int) -> np.ndarray:
    """The mask (height, width) of bytes 0 and 1.

    Raises:
        revnets.SpecError: it is of polygons, and faster-coco-eval is not installed.
    """
    if isinstance(segmentation, RunLengths):
        inside = np.arange(len(segmentation.counts)) % 2 == 1
        return np.repeat(inside, segmentation.counts).reshape(width, height).T.astype(np.uint8)
    api = mask_api()
    drawn = api.frPyObjects([list(points) for points in segmentation.outlines], height, width)
    return np.ascontiguousarray(api.decode(api.merge(drawn)))


def coco_segmentation(segmentation: Segmentation, height: int, width: int) -> list[list[float]] | dict[str, Any]:
    """The mask as the evaluation of COCO takes it: polygons, or run lengths as packed text."""
    if isinstance(segmentation, Polygons):
        return [points.tolist() for points in segmentation.outlines]
    plain = {"size": [height, width], "counts": segmentation.counts.tolist()}
    return mask_api().frPyObjects(plain, height, width)


def packed_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (H, W) of zeros and ones as COCO's run lengths: `size` and `counts`, a text.

    Raises:
        ValueError: it has other axes.
    """
    if mask.ndim != 2:
        raise ArgumentError(f"a mask has two axes, this one {mask.ndim}", "mask", code="shape-mismatch")
    found = mask_api().encode(np.asfortranarray(mask, dtype=np.uint8))
    counts = found["counts"]
    return {"size": [int(side) for side in found["size"]], "counts": _text(counts)}


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def mask_api() -> Any:
    """COCO's functions on masks, in C++.

    Raises:
        revnets.SpecError: faster-coco-eval is not installed.
    """
    try:
        import faster_coco_eval.core.mask as api
    except ImportError:
        raise missing_library() from None
    return api


def missing_library() -> Exception:
    """The error for a run that needs faster-coco-eval where it is not installed."""
    remedy = "pip install 'revnets[dense]'"
    return run_error("data", "faster-coco-eval is not installed", remedy, code="missing-dependency")
