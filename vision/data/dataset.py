"""The data of a run: a training set, a validation set, and the images that cannot be read.

A sample of the training set is asked for by its key (epoch, index), and draws its augmentation from generators that
are seeded with (seed, epoch, index). So neither the number of workers, nor the number of processes, nor where a run
was interrupted makes a difference to any image. (Streams have no index: see `vision.data.streaming`.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from revnets.utils.regular_files import require_regular
from vision.config.data import CocoConfig, DataConfig, DigitsConfig, IdxConfig, SemanticMapsConfig, SourcesConfig
from vision.distributed.context import World
from vision.errors import DataError, printable, run_error


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What happens with images that cannot be read.

    Raises:
        revnets.SpecError: something else than a regular file has the name of `file`.

    Attributes:
        file: gets a line for each; every process of a run has its own. Workers append to it, so it counts for all.
        policy: `skip` or `stop`.
    """

    file: Path | None = None
    policy: str = "skip"

    def __post_init__(self) -> None:
        if self.file is not None and os.path.lexists(self.file):
            try:
                require_regular(self.file)
            except OSError as error:
                problem = f"{error.filename}: {error.strerror}"
                raise run_error("output", problem, "Remove it, or give another output", code="not-a-file") from None

    def note(self, what: str, error: BaseException | str) -> None:
        """Write one down.

        Raises:
            DataError: the policy is to stop.
        """
        what = printable(what)
        reason = printable(" ".join(str(error).split())) or type(error).__name__
        if self.policy == "stop":
            remedy = "Repair or remove it, or set data.unreadable to skip"
            raise DataError(f"{what}: cannot be read ({reason.rstrip('.')}). {remedy}")
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(f"{what}: {reason}\n")

    def count(self) -> int:
        """How many have been written down so far."""
        if self.file is None or not self.file.exists():
            return 0
        with open(self.file, "rb") as file:
            return sum(1 for _ in file)


@dataclass(frozen=True, slots=True)
class DataSplits:
    """The data of a run: what the trainer looks at. A task may give any object with these attributes.

    Both sets are data sets as torch's loaders take them. The training set knows its length and is asked by
    `vision.data.samplers.Key`, the validation set by number; or both are streams.
    """

    train: Any
    val: Any
    unreadable: Unreadable = field(default_factory=Unreadable)


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
    remarks: tuple[str, ...] = ()  # lines about what is not as expected, but does no harm
    provenance: dict[str, Any] = field(default_factory=dict)  # of soft labels and lists of images, by configuration key


def load_data(config: DataConfig, seed: int, notes: Path | None = None, world: World | None = None) -> ImageData:
    """The data that a configuration names.

    Args:
        seed: of the augmentations. The split into training and validation set is always the same.
        notes: file that lists images that could not be read.
        world: the processes that share a stream.

    Raises:
        revnets.SpecError: there are no such data.
    """
    if isinstance(config, DigitsConfig):
        from vision.data.in_memory import load_digits

        return load_digits(config, seed)
    if isinstance(config, IdxConfig):
        from vision.data.in_memory import load_idx

        return load_idx(config, seed)
    if isinstance(config, SemanticMapsConfig):
        problem = "this task does not read class maps"
        raise run_error("data.name", problem, "Give task: semantic_segmentation", code="conflicting-values")
    if isinstance(config, SourcesConfig):
        problem = "several sources have several sets of classes, and this reads one"
        raise run_error("data", problem, "Name one data set", code="conflicting-values")
    if isinstance(config, CocoConfig):
        problem = "this task does not read boxes of objects"
        raise run_error("data.name", problem, "Give task: object_detection", code="conflicting-values")
    from vision.data.timm_readers import load_images  # every kind of data has requirements of its own

    return load_images(config, seed, Unreadable(notes, config.unreadable), world or World())


def class_names(found: dict[str, int], count: int | None) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers; a number where there is no name."""
    names = {number: name for name, number in found.items()}
    return tuple(names.get(number, str(number)) for number in range(count or max(names, default=-1) + 1))
