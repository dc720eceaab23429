"""Random numbers as functions of (seed, place), so that a run has no generator whose state would have to be kept."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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
