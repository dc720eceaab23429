"""A training set that mixes several sets, each with its share of an epoch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from math import gcd
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vision.data.samplers import Key


class Mixture(Dataset[Any]):
    """Several training sets as one, indexed by `Key`. Each set has a share of an epoch in proportion to its weight.

    The samples of a set are used in a fixed order, across epochs, so every sample is used once before any is used
    again. A sample that occurs twice in an epoch has two different augmentations. An epoch has as many samples as all
    sets together.

    Args:
        sets: Indexed by `Key`.
        weights: Positive; None for the numbers of samples.

    Attributes:
        counts: Samples of each set in an epoch.
    """

    def __init__(self, sets: Sequence[Any], weights: Sequence[float] | None = None):
        self.sets, self.sizes = sets, [len(one) for one in sets]
        total = sum(self.sizes)
        parts = np.cumsum(finite_weights(self.sizes if weights is None else weights))
        self.starts = [0, *np.rint(parts / parts[-1] * total).astype(int).tolist()]
        self.counts = np.diff(self.starts).tolist()
        self.steps = [_even_step(size) for size in self.sizes]

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, key: Key) -> Any:
        number = bisect_right(self.starts, key.index) - 1
        place = key.epoch * self.counts[number] + key.index - self.starts[number]
        turn, place = divmod(place, self.sizes[number])
        return self.sets[number][Key(turn, place * self.steps[number] % self.sizes[number])]


def finite_weights(weights: Sequence[float]) -> np.ndarray:
    """Scale weights by a power of two, which changes no share, so that their sum is finite."""
    return np.ldexp(np.array(weights, dtype=np.float64), -np.frexp(float(max(weights)))[1])


def _even_step(size: int) -> int:
    """A step, near the golden section, that visits all of `size` samples and covers them evenly at any time."""
    step = max(1, round(size * (5**0.5 - 1) / 2))
    while gcd(step, size) != 1:
        step += 1
    return step
