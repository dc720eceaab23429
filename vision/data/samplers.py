"""Which samples make up which batch of which epoch, and which process gets it; and the seeds of random numbers.

Random numbers are functions of (seed, place), so that a run has no generator whose state would have to be kept.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from revnets.config.errors import ArgumentError
from vision.distributed.context import World


class Key(NamedTuple):
    """Which sample, and in which epoch: each has its own augmentation."""

    epoch: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # nobody searches a key


class EpochBatches(Sampler[list[Key]]):
    """The batches of one epoch, in an order drawn from (seed, epoch), beginning wherever a run was interrupted.

    The samples that do not fill an update of all processes are left out; they differ from epoch to epoch.

    Args:
        length: samples in the set.
        batch_size: of one process and forward pass.
        accum: forward passes per update.
        seed: of the order.
        rank, world_size: this process takes every `world_size`-th batch.

    Raises:
        ValueError: the set has not enough samples for one update.
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
        """Let the next iteration be that of `epoch`, from its update `start` on."""
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
    """A process's share of a validation set: every `world.size`-th sample.

    All shares are equally long, since processes that share their weights must all make the same forward passes. What
    is missing is filled up with the last sample, changed by `padding` into one that no evaluation counts.
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


def seed_all(*place: int) -> None:
    """Seed the generators of Python, numpy and torch, on all devices, with a place such as (seed, forward pass)."""
    first, second, third = _seeds(place)
    random.seed(first)
    np.random.seed(second)
    torch.manual_seed(third)


@contextmanager
def seeded(*place: int) -> Iterator[None]:
    """Within it the generators of the CPU are seeded with a place; afterwards they are where they were."""
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
