"""Search for the policy with the least compute that fits a memory budget, by dynamic programming.

At cell u, in forward and backward, the memory holds what the cells before u keep and what u itself needs. A choice of
one option per cell fits if, for every u, the bytes kept by the cells before u leave enough memory for the option of u.
The sum of these bytes, in small units, is the state of the dynamic program, as in the search for optimal checkpoints
of a chain (Beaumont et al., arXiv 1911.13214).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

UNITS = 16384
"""Number of units into which the memory is divided."""


class Option(NamedTuple):
    """What one cell saves for backward, and what that costs.

    Attributes:
        kept: Bytes that the cell keeps on the device between forward and backward.
        work: Compute cost of the cell, in units of `OpCounter.work`.
        room: Largest number of bytes that the cells before it may keep, so that this option fits.
        replayed: How many of its saved tensors a replay restores (`Kept`), or `LOST`, `STATE` or `ALL`.
        host: Bytes that the cell keeps in host memory.
        waits: Part of `work` that is spent waiting for the link to the host.
        products: Indices of the matrix products whose results the cell keeps.
    """

    kept: int
    work: int
    room: int
    replayed: int | None
    host: int = 0
    waits: int = 0
    products: tuple[int, ...] = ()


STATE, LOST, ALL = None, -1, -2
"""Values of `Option.replayed`: save only the state, only its lost bits, or everything."""


def search(cells: Sequence[Sequence[Option]], room: int) -> list[Option] | None:
    """Return the options of all cells that fit with the least compute.

    Args:
        cells: Options of each cell, in the order of the forward pass.
        room: Bytes that all cells together may keep.

    Returns:
        One option per cell, or None if nothing fits.
    """
    least = sum(min(option.kept for option in options) for options in cells)  # negative if gradients outweigh it
    unit = max(room / UNITS, (room - least) / (8 * UNITS), 1.0)
    found = _search(cells, room, unit, 0)
    return found or _search(cells, room, unit, len(cells))  # rounding may exclude a choice that fits


def _search(cells: Sequence[Sequence[Option]], room: int, unit: float, tolerance: int) -> list[Option] | None:
    """Search in units of `unit` bytes. Limits are relaxed by `tolerance` units."""
    least = [min(option.kept for option in options) for options in cells]  # what each cell keeps at least
    highest = int((room - sum(least)) // unit) + tolerance
    if highest < 0:
        return None
    work = np.full(highest + 1, np.inf)  # least cost by the units that are kept in addition to `least`
    work[0] = 0.0
    choices: list[np.ndarray] = []
    for options, floor, before in zip(cells, least, accumulate(least, initial=0), strict=False):
        best, chosen = np.full_like(work, np.inf), np.full(len(work), -1, dtype=np.int16)
        for number, option in enumerate(options):
            step = round((option.kept - floor) / unit)
            fits = int((option.room - before) // unit) + tolerance  # units that the cells before it may keep
            reach = min(fits, highest - step)
            if reach < 0:
                continue
            candidate = np.full_like(work, np.inf)
            candidate[step : step + reach + 1] = work[: reach + 1] + option.work
            better = candidate < best
            best[better], chosen[better] = candidate[better], number
        work = best
        choices.append(chosen)
    place = int(np.argmin(work))
    if not np.isfinite(work[place]):
        return None
    found: list[Option] = []
    for options, floor, chosen in zip(reversed(cells), reversed(least), reversed(choices), strict=True):
        option = options[chosen[place]]
        found.append(option)
        place -= round((option.kept - floor) / unit)
    return found[::-1]
