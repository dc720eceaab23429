"""What a data set is to a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vision.unreadable import Unreadable


@dataclass(frozen=True, slots=True)
class ImageData:
    """A training set, a validation set, and what both are made of.

    Both are data sets as torch's loaders take them, and know their length. The training set is asked by
    `vision.data.samplers.Key` and the validation set by number, or both are streams.
    """

    train: Any
    val: Any
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # of an image: (channels, height, width)
    mean: tuple[float, ...]  # of the normalisation, one value or one a channel
    std: tuple[float, ...]
    unreadable: Unreadable = field(default_factory=Unreadable)


def class_names(found: dict[str, int], count: int | None) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers; a number where there is no name."""
    names = {number: name for name, number in found.items()}
    return tuple(names.get(number, str(number)) for number in range(count or max(names, default=-1) + 1))
