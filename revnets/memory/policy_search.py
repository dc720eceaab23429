"""Which cells keep what: the least work that fits a budget, by dynamic programming.

At cell u, in the forward as in backward, the memory holds what the cells before u keep, and what u itself needs. So a
choice of one option per cell fits if, for every u, the bytes of the cells before it leave the room that u takes in its
own option. The sum of these bytes, in small units, is the state of the program, as in the search for optimal
checkpoints of a chain (Beaumont et al., arXiv 1911.13214).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

UNITS = 16384
"""Steps into which the memory is divided."""


class Option(NamedTuple):
    """One way to treat a cell."""

    kept: int  # bytes that it leaves behind
    work: int  # that it takes
    room: int  # bytes that cells before it may keep at most, for it to fit when the step is there
    replayed: int | None  # how many of its saved tensors a replay brings back (`Kept`); see LOST, STATE and ALL
    host: int = 0  # bytes that it leaves behind in host memory
    waits: int = 0  # part of its work: waiting for the link to the host
    products: tuple[int, ...] = ()  # numbers of the products whose results it keeps


STATE, LOST, ALL = None, -1, -2
"""Values of `Option.replayed`: keep the state alone; its lost bits; everything."""


def search(cells: Sequence[Sequence[Option]], room: int) -> list[Option] | None:
    """The options of all cells with the least work that fit.

    Args:
        cells: what there is to choose from, in the order of the forward.
        room: bytes that all cells together may keep.

    Returns:
        One option per cell; None if nothing fits.
    """
    least = sum(min(option.kept for option in options) for options in cells)  # less than 0 if gradients outweigh it
    unit = max(room / UNITS, (room - least) / (8 * UNITS), 1.0)
    found = _search(cells, room, unit, 0)
    return found or _search(cells, room, unit, len(cells))  # rounding may go against a choice that fits


def _search(cells: Sequence[Sequence[Option]], room: int, unit: float, tolerance: int) -> list[Option] | None:
    """The search in units of so many bytes; every cell may be off by a tolerance in units."""
    least = [min(option.kept for option in options) for options in cells]  # what a cell keeps in any case
    highest = int((room - sum(least)) // unit) + tolerance
    if highest < 0:
        return None
    work = np.full(highest + 1, np.inf)  # the least, by the units that are kept beside `least`
    work[0] = 0.0
    choices: list[np.ndarray] = []
    for options, floor, before in zip(cells, least, accumulate(least, initial=0), strict=False):
        best, chosen = np.full_like(work, np.inf), np.full(len(work), -1, dtype=np.int16)
        for number, option in enumerate(options):
            step = round((option.kept - floor) / unit)
            fits = int((option.room - before) // unit) + tolerance  # units that others may keep when the cell runs
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
