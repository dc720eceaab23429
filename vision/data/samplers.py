"""Batches of an epoch, their distribution over processes, and seeds of random numbers.

Random numbers are functions of (seed, place), so a run has no generator state to save.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from revnets.config.errors import ArgumentError
from vision.config.run import TrainConfig
from vision.data.dataset import DataSplits, ImageData
from vision.distributed.context import World, leave_signals_to_parent
from vision.errors import run_error

Collate = Callable[[list[Any]], Any]


class Key(NamedTuple):
    """A sample in an epoch. Each key has its own augmentation."""

    epoch: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # tuple.index is not used


class EpochBatches(Sampler[list[Key]]):
    """The batches of one epoch, in an order drawn from (seed, epoch), from any update on.

    Samples that do not fill an update of all processes are dropped; they differ from epoch to epoch.

    Args:
        length: Number of samples in the set.
        batch_size: Samples per process and forward pass.
        accum: Forward passes per update.
        seed: Of the order.
        rank, world_size: this process takes every `world_size`-th batch.

    Raises:
        ArgumentError: If the set has too few samples for one update.
    """

    def __init__(self, length: int, batch_size: int, accum: int, seed: int, rank: int = 0, world_size: int = 1):
        self.length, self.batch_size, self.accum, self.seed = length, batch_size, accum, seed
        self.rank, self.world_size = rank, world_size
        self.updates = length // (batch_size * accum * world_size)
        if self.updates == 0:
            raise ArgumentError(
                f"{length} samples do not fill one update of {batch_size * accum * world_size}",
                "length",
                code="too-few-samples",
            )
        self.epoch, self.start = 0, 0

    def begin(self, epoch: int, start: int = 0) -> None:
        """Set the epoch of the next iteration, and its first update."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return (self.updates - self.start) * self.accum

    def __iter__(self) -> Iterator[list[Key]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        epoch, size = self.epoch, self.batch_size
        for batch in range(self.start * self.accum, self.updates * self.accum):
            first = (batch * self.world_size + self.rank) * size
            yield [Key(epoch, index) for index in order[first : first + size].tolist()]


class Share(Dataset[Any]):
    """The part of a validation set that one process evaluates: every `world.size`-th sample.

    All parts have the same length, because processes with sharded weights must make the same forward passes. A shorter
    part is padded with the last sample, which `padding` changes into one that no evaluation counts.
    """

    def __init__(self, whole: Dataset, world: World, padding: Callable[[Any], Any]):
        self.whole, self.world, self.padding = whole, world, padding
        self.length = len(cast(Sized, whole))

    def __len__(self) -> int:
        return -(-self.length // self.world.size)

    def __getitem__(self, index: int) -> Any:
        sample = index * self.world.size + self.world.rank
        return self.whole[sample] if sample < self.length else self.padding(self.whole[self.length - 1])


def without_class(sample: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """The same image with the class -1, which no evaluation counts."""
    image, label = sample
    return image, torch.full_like(label, -1) if isinstance(label, Tensor) else -1


class TrainBatches:
    """The training batches of a process, epoch by epoch.

    Args:
        config: Of the run.
        data: Of the run.
        world: The processes of the run.
        collate: Makes a batch of samples; torch's by default.

    Raises:
        revnets.SpecError: If the set has too few samples for one update.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageData | DataSplits,
        world: World | None = None,
        collate: Collate = default_collate,
    ):
        world = world or World()
        self.accum = config.grad_accum
        try:
            self.order = EpochBatches(
                len(data.train), config.batch_size, self.accum, config.seed, world.rank, world.size
            )
        except ValueError as error:
            raise run_error(
                "batch_size", str(error), "Lower batch_size or grad_accum", code="too-few-samples"
            ) from None
        self.stream: Any = data.train if config.batch_is_stream else None
        options: dict[str, Any] = {"batch_size": config.batch_size} if self.stream else {"batch_sampler": self.order}
        self.loader = _loader(data.train, config, collate, **options)

    @property
    def updates(self) -> int:
        """Updates of an epoch."""
        return self.order.updates

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches from update `start` of the epoch on: for `ImageData`, images (B, C, H, W) and class numbers (B,)."""
        if self.stream is None:
            self.order.begin(epoch, start)
            return iter(self.loader)
        self.stream.epoch = epoch
        return islice(self.loader, start * self.accum, self.updates * self.accum)


def val_loader(
    config: TrainConfig,
    data: ImageData | DataSplits,
    world: World | None = None,
    collate: Collate = default_collate,
    padding: Callable[[Any], Any] = without_class,
) -> DataLoader:
    """A loader of the part of the validation set that this process evaluates, padded to equal length.

    Args:
        config: Of the run.
        data: Of the run.
        world: The processes of the run.
        collate: Makes a batch of samples; torch's by default.
        padding: Changes a sample into one that no evaluation counts; by default it sets the class to -1.
    """
    val = data.val if config.batch_is_stream else Share(data.val, world or World(), padding)
    return _loader(val, config, collate, batch_size=config.batch_size)


def _loader(dataset: Dataset, config: TrainConfig, collate: Collate, **options: Any) -> DataLoader:
    # A loader draws a number for its workers at the start of every epoch. If it came from the global generator, the
    # numbers that the model draws would depend on the interruptions of the run.
    generator = torch.Generator().manual_seed(config.seed)
    return DataLoader(
        dataset,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=torch.cuda.is_available() and config.device != "cpu",
        generator=generator,
        collate_fn=collate,
        worker_init_fn=leave_signals_to_parent,
        **options,
    )


def seed_all(*place: int) -> None:
    """Seed the generators of Python, numpy and torch, on all devices, with a place such as (seed, forward pass)."""
    first, second, third = _seeds(place)
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)


def torch_seed(*place: int) -> int:
    """The seed that `seed_all` gives to the generators of torch."""
    return _seeds(place)[2]


@contextmanager
def seeded(*place: int) -> Iterator[None]:
    """Seed the generators of the CPU with a place, and restore their states afterwards."""
    first, second, third = _seeds(place)
    python, numpy, state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(first)
    np.random.seed(second)
    torch.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(state)


def _seeds(place: tuple[int, ...]) -> list[int]:
    return [int(word) for word in np.random.SeedSequence(place).generate_state(3)]
