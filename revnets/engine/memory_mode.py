"""Which activations a cell keeps for backward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum


class Memory(StrEnum):
    """How the state x_{t-m}, which cell t replaces, comes back in backward."""

    STORE = "store"  # autograd keeps it, and all that the cell saves: no replay
    RECOMPUTE = "recompute"  # the tape keeps it; the cell is replayed
    INVERT = "invert"  # rebuilt by the inverse alone; rounding errors add up
    EXACT = "exact"  # rebuilt by the inverse and the lost bits, bit for bit


def memory_modes(value: str | Sequence[str], columns: int) -> tuple[Memory, ...]:
    """One memory mode per column, from one for all or a list.

    Raises:
        ValueError: an unknown mode, or a list of another length.
    """
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value] * columns
    for item in values:
        if item not in list(Memory):
            raise ValueError(f"memory mode {item!r} is unknown; choose {', '.join(Memory)}")
    if len(values) != columns:
        raise ValueError(f"{len(values)} memory modes for {columns} columns; give one for all or one per column")
    return tuple(Memory(item) for item in values)
