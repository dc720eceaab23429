"""Data that is read sequentially: webdataset's shards, and streamed data sets of Hugging Face.

timm's readers shuffle samples by (seed, epoch) and distribute shards to processes and workers. The order therefore
depends on the numbers of both, and a run that resumes in the middle of an epoch reads the start of the epoch again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vision.data.dataset import Unreadable
from vision.data.decoding import Exif, converted
from vision.data.samplers import seeded
from vision.distributed.context import World
from vision.errors import DataError, first_line, printable


class Stream(IterableDataset[tuple[Tensor, Any]]):
    """One of timm's streaming readers.

    Args:
        make: Creates the reader.
        transform: From a PIL image to a tensor.
        unreadable: Policy for images that cannot be read.
        world: The processes that share a validation set. (For training, the reader queries torch.distributed.)
        seed: Of the augmentations; None for validation.
        exif: Whether the EXIF orientation is applied. Streamed data sets of Hugging Face always apply it.

    Attributes:
        count: Number of classes; None if labels are not compared with it.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        transform: Callable[[Any], Tensor],
        unreadable: Unreadable,
        world: World,
        seed: int | None = None,
        exif: Exif = "ignore",
    ):
        self.exif: Exif = exif
        self.count: int | None = None
        self.reader, self.transform, self.unreadable, self.world, self.seed = make(), transform, unreadable, world, seed
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers live longer than an epoch
        if seed is None:  # every process reads all samples and takes its part, so that none is skipped or repeated
            self.reader.dist_rank, self.reader.dist_num_replicas = 0, 1

    @property
    def class_to_idx(self) -> dict[str, int]:
        return dict(self.reader.class_to_idx)

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._epoch.fill_(value)

    def __len__(self) -> int:
        """Number of samples in the whole set, as configured or found by the reader."""
        return int(self.reader.num_samples or 0)

    def __iter__(self) -> Iterator[tuple[Tensor, Any]]:
        self.reader.ds = None  # start again with empty shuffling buffers
        self.reader.set_epoch(self.epoch)
        with noting(self.unreadable):
            yield from self._share() if self.seed is None else self._augmented(self.seed)

    def _samples(self) -> Iterator[tuple[Any, Any]]:
        """Images and labels from the reader."""
        return iter(self.reader)

    def _read(self) -> Iterator[tuple[Any, Any]]:
        samples = self._samples()
        while True:
            try:
                sample = next(samples)
            except StopIteration:
                return
            except DataError:
                raise
            except Exception as error:  # readers raise errors of any type
                raise DataError(f"{type(self.reader).__name__}: {first_line(error)}. Check the shards") from error
            yield sample

    def _augmented(self, seed: int) -> Iterator[tuple[Tensor, Any]]:
        worker = get_worker_info()
        place = (seed, self.epoch, self.world.rank, worker.id if worker else 0)
        for number, (picture, label) in enumerate(self._read()):
            image = self._image(picture)
            if image is not None:
                with seeded(*place, number):
                    sample = self.transform(image), class_of(int(label), self.count, f"sample {number}", True)
                yield sample

    def _share(self) -> Iterator[tuple[Tensor, int]]:
        size, number, blank = self.world.size, -1, Image.new("RGB", (8, 8))
        for number, (picture, label) in enumerate(self._read()):
            if number % size == self.world.rank:
                image, label = self._image(picture), -1 if label is None else int(label)
                if image is None:
                    yield self.transform(blank), -1
                else:
                    yield self.transform(image), class_of(label, self.count, f"sample {number}", False)
        if number % size < self.world.rank and number >= 0:  # parts have the same length, see `Share`
            yield self.transform(blank), -1

    def _image(self, picture: Image.Image) -> Image.Image | None:
        """An image as RGB; None, with a note, if it cannot be converted."""
        try:
            return converted(picture, exif=self.exif)
        except Exception as error:
            self.unreadable.note(type(self.reader).__name__, error)
            return None


def class_of(label: int, count: int | None, name: str, is_training: bool) -> int:
    """Check a class number and return it.

    Args:
        label: The class number.
        count: Number of classes; None if it is unknown.
        name: Of the sample.
        is_training: Whether -1, a sample of a validation set that does not count, is refused.

    Raises:
        DataError: If the class number is out of range.
    """
    if count is not None and (label >= count or label < (0 if is_training else -1)):
        raise DataError(f"{printable(name)}: its class is {label}, not from 0 to {count - 1}. Check the labels")
    return label


class _Notes(logging.Handler):
    """Forwards log records of timm's webdataset reader, which only logs the samples that it skips."""

    def __init__(self, unreadable: Unreadable):
        super().__init__(logging.WARNING)
        self.unreadable = unreadable

    def emit(self, record: logging.LogRecord) -> None:
        if "error" in (text := record.getMessage()):
            self.unreadable.note("webdataset", text)


class noting:
    """Context in which samples that webdataset skips are noted."""

    logger = logging.getLogger("timm.data.readers.reader_wds")

    def __init__(self, unreadable: Unreadable):
        self.handler = _Notes(unreadable)

    def __enter__(self) -> None:
        self.logger.addHandler(self.handler)
        self.propagated, self.logger.propagate = self.logger.propagate, False

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.propagate = self.propagated
