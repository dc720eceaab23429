"""Webdataset streams with targets of several heads, alone or mixed by weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from timm.data.readers.class_map import remap_target
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from vision.data.samplers import seeded
from vision.data.streaming import Stream, class_of
from vision.errors import DataError
from vision.pseudo_labels.label_lookup import LabelLookup
from vision.pseudo_labels.mixture import finite_weights
from vision.pseudo_labels.targets import HeadTargets


class LabeledStream(Stream):
    """A training stream with targets instead of classes.

    Args:
        stream: Of images, with or without classes. Reader, transform and epoch are shared with it.
        targets: Makes targets.
        head: Whose classes the shards have (`.cls`); None if they have no classes.
        lookup: Soft labels; None without soft labels.
        excluded: Keys of `sample_key` that are skipped.
    """

    def __init__(
        self,
        stream: Stream,
        targets: HeadTargets,
        head: str | None,
        lookup: LabelLookup | None,
        excluded: frozenset[str] = frozenset(),
    ):
        vars(self).update(vars(stream))
        self.targets, self.head, self.lookup, self.excluded = targets, head, lookup, excluded
        self.turn = 0  # how many times this process has started the stream

    @property
    def soft_heads(self) -> tuple[str, ...]:
        """Heads with soft labels."""
        return () if self.lookup is None else tuple(self.lookup.shared)

    def _samples(self) -> Iterator[tuple[Any, Any]]:
        """Images with their keys and class numbers."""
        from webdataset.filters import map as mapped

        reader = self.reader
        reader._lazy_init()
        decode = len(reader.ds.pipeline) - 2  # the last two stages of timm decode a sample and rename its items
        reader.ds.pipeline.insert(decode, mapped(self._keyed))
        for sample in reader.ds.with_epoch(reader._num_samples_per_worker()):
            label = sample["target"]
            if reader.remap_class and self.head is not None:  # by `class_map`, as in timm's iterator
                label = remap_target(label, reader.class_to_idx, reader._source_names, dense=reader.dense_target)
            yield sample["image"], (sample["__key__"], label)

    def _keyed(self, sample: dict[str, Any]) -> dict[str, Any] | None:
        """A sample with the name of its tar in its key; None for a sample that is skipped."""
        key = f"{os.path.basename(sample['__url__'])}/{sample['__key__']}"
        is_lost = self.head is None and self.lookup is not None and key in self.lookup.unreadable
        if key in self.excluded or is_lost:
            return None
        sample["__key__"] = key
        return sample if self.head is not None else sample | {"cls": b"-1"}

    def _augmented(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        place = (seed, self.epoch, self.turn, self.world.rank, worker.id if worker else 0)
        self.turn += 1
        for number, (picture, (key, label)) in enumerate(self._read()):
            image = self._image(picture)
            if image is None:
                continue
            soft, row = self.lookup(key) if self.lookup is not None else ({}, -1)
            count = None if self.head is None else self.targets.heads[self.head]
            target = self.targets.target(self.head, class_of(int(label), count, key, True), soft, row)
            with seeded(*place, number):
                yield self.transform(image), target


class MixedStreams(IterableDataset[tuple[Tensor, Tensor]]):
    """Several training streams as one. The stream of each sample is drawn by the weights.

    A stream that ends before the others starts again with other augmentations. If the shards of a worker have no usable
    sample of a stream, this worker draws from the other streams.

    Args:
        streams: At least one.
        weights: Positive; None for the numbers of samples.
        seed: Of the draws.

    Raises:
        DataError: While iterating, if the shards of a worker have no usable sample of any stream.
    """

    def __init__(self, streams: Sequence[LabeledStream], weights: Sequence[float] | None, seed: int):
        self.streams, self.seed = streams, seed
        parts = finite_weights([len(stream) for stream in streams] if weights is None else weights)
        self.shares = parts / parts.sum()

    def __len__(self) -> int:
        return sum(len(stream) for stream in self.streams)

    @property
    def counts(self) -> list[int]:
        """Samples of each stream in an epoch, on average."""
        return np.rint(self.shares * len(self)).astype(int).tolist()

    @property
    def epoch(self) -> int:
        return self.streams[0].epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        for stream in self.streams:
            stream.epoch = value

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        world, workers = self.streams[0].world, worker.num_workers if worker else 1
        generator = np.random.default_rng((self.seed, self.epoch, world.rank, worker.id if worker else 0))
        for stream in self.streams:
            stream.turn = 0
        running, shares = [iter(stream) for stream in self.streams], self.shares
        for _ in range(-(-len(self) // (world.size * workers))):
            sample = None
            while sample is None:
                number = int(generator.choice(len(running), p=shares))
                sample = next(running[number], None)
                if sample is None:
                    running[number] = iter(self.streams[number])
                    sample = next(running[number], None)
                if sample is None:
                    shares = self._without(number, shares)
            yield sample

    def _without(self, number: int, shares: np.ndarray) -> np.ndarray:
        """The shares without a stream that has no samples."""
        others = np.where(np.arange(len(shares)) == number, 0.0, shares)
        if not others.any():
            root = self.streams[number].reader.root
            raise DataError(f"{root}: some shards have no usable sample. Check exclude and labels")
        return others / others.sum()


class ClassStreams(IterableDataset[tuple[Tensor, Tensor]]):
    """Validation streams one after another, with class numbers (heads,) that are -1 except for one head.

    Args:
        streams: Pairs of the index of the head and the stream.
        heads: Number of heads.
    """

    def __init__(self, streams: Sequence[tuple[int, Stream]], heads: int):
        self.streams, self.heads = streams, heads

    def __len__(self) -> int:
        return sum(len(stream) for _, stream in self.streams)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for head, stream in self.streams:
            for image, label in stream:
                classes = torch.full((self.heads,), -1)
                classes[head] = label
                yield image, classes
