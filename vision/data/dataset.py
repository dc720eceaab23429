"""The data of a run: training set, validation set, and the policy for images that cannot be read.

A training sample is indexed by its key (epoch, index), and its augmentation draws from generators that are seeded with
(seed, epoch, index). The numbers of workers and processes and the point of an interruption therefore do not change any
image. (Streams have no index, see `vision.data.streaming`.)
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
    """The policy for images that cannot be read, and the log of them.

    Attributes:
        file: Receives a line for each image; every process of a run has its own file, to which its workers append.
        policy: `skip` or `stop`.

    Raises:
        revnets.SpecError: `file` exists and is not a regular file.
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
        """Log an image.

        Raises:
            DataError: If the policy is `stop`.
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
        """Number of images logged so far."""
        if self.file is None or not self.file.exists():
            return 0
        with open(self.file, "rb") as file:
            return sum(1 for _ in file)


@dataclass(frozen=True, slots=True)
class DataSplits:
    """The data of a run as the trainer uses it. A task may return any object with these attributes.

    Both sets are data sets of `torch.utils.data`. The training set has a length and is indexed by
    `vision.data.samplers.Key`, the validation set by number; or both are streams.
    """

    train: Any
    val: Any
    unreadable: Unreadable = field(default_factory=Unreadable)


@dataclass(frozen=True, slots=True)
class ImageData:
    """A training set and a validation set of images, with their classes and normalization.

    Both are data sets of `torch.utils.data` with a length. The training set is indexed by `vision.data.samplers.Key`
    and the validation set by number, or both are streams.
    """

    train: Any
    val: Any
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # of an image: (channels, height, width)
    mean: tuple[float, ...]  # of the normalization, one value or one per channel
    std: tuple[float, ...]
    unreadable: Unreadable = field(default_factory=Unreadable)
    remarks: tuple[str, ...] = ()  # warnings, one line each
    provenance: dict[str, Any] = field(default_factory=dict)  # of soft labels and lists of images, by configuration key


def load_data(config: DataConfig, seed: int, notes: Path | None = None, world: World | None = None) -> ImageData:
    """Open the data that a configuration names.

    Args:
        config: The key `data` of a run.
        seed: Of the augmentations. The split into training and validation set does not depend on it.
        notes: File that lists images that could not be read.
        world: The processes that share a stream.

    Raises:
        revnets.SpecError: If the data is missing, damaged, or not for classification.
    """
    if isinstance(config, DigitsConfig):
        from vision.data.in_memory import load_digits

        return load_digits(config, seed)
    if isinstance(config, IdxConfig):
        from vision.data.in_memory import load_idx

        return load_idx(config, seed)
    if isinstance(config, SemanticMapsConfig):
        problem = "this task does not read semantic maps"
        raise run_error("data.name", problem, "Give task: semantic_segmentation", code="conflicting-values")
    if isinstance(config, SourcesConfig):
        problem = "a list of sources has several sets of classes, but one set is needed"
        raise run_error("data", problem, "Give one data set", code="conflicting-values")
    if isinstance(config, CocoConfig):
        problem = "this task does not read boxes of objects"
        raise run_error("data.name", problem, "Give task: object_detection", code="conflicting-values")
    from vision.data.timm_readers import load_images  # each kind of data has its own dependencies

    return load_images(config, seed, Unreadable(notes, config.unreadable), world or World())


def class_names(found: dict[str, int], count: int | None) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers. A class without a name is named by its number."""
    names = {number: name for name, number in found.items()}
    return tuple(names.get(number, str(number)) for number in range(count or max(names, default=-1) + 1))
