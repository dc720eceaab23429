# pyright: reportUnnecessaryIsInstance=false
"""Which activations a network keeps for backward: the memory mode of each column, and the policy of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeAlias, cast

from revnets.engine.errors import ArgumentError


class Memory(StrEnum):
    """How the state x_{t-m}, which cell t replaces, comes back in backward."""

    STORE = "store"  # autograd keeps it, and all that the cell saves: no replay
    RECOMPUTE = "recompute"  # the tape keeps it; the cell is replayed
    INVERT = "invert"  # rebuilt by the inverse alone; rounding errors add up
    EXACT = "exact"  # rebuilt by the inverse and the lost bits, bit for bit


class Budget(Protocol):
    """A memory budget, as the engine carries it; `revnets.config.memory_budget.BudgetSpec` is one."""

    @property
    def budget(self) -> int | str: ...
    @property
    def optimizer(self) -> str: ...
    @property
    def grad_accum(self) -> int: ...
    @property
    def ranks(self) -> int | None: ...
    @property
    def sharding(self) -> str | None: ...


Kept: TypeAlias = "Mapping[int, int | None]"
"""Cells that keep the state x_{t-m} that they replace, by index. An integer k: they keep what they save as well, but
for the first k tensors, which a replay brings back. None: they keep the state alone."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """What reversible columns keep for backward. It is immutable; `dataclasses.replace` makes another one.

    Raises:
        ArgumentError: an unknown memory mode.
    """

    modes: tuple[Memory, ...]  # one per column
    stored: frozenset[int] = frozenset()  # indices of cells that keep all they save, whatever their column's mode
    verify: bool = False  # compare what backward rebuilds with checksums of the forward
    budget: Budget | None = None  # pending until the first training forward of the model, see `revnets.keep_budget`
    kept: tuple[tuple[int, int | None], ...] = ()  # items of a `Kept`, in order of the cells

    def __post_init__(self) -> None:
        if not isinstance(self.modes, tuple) or not all(isinstance(mode, Memory) for mode in self.modes):
            object.__setattr__(self, "modes", memory_modes(list(self.modes), len(self.modes)))
        object.__setattr__(self, "stored", frozenset(self.stored))
        object.__setattr__(self, "kept", tuple(sorted(dict(self.kept).items())))

    def __setstate__(self, state: list[Any]) -> None:
        defaults: list[Any] = [(), frozenset(), False, None, ()]  # an older pickle ends before the last of them
        for name, value in zip(self.__slots__, [*state, *defaults[len(state) :]], strict=True):
            object.__setattr__(self, name, value)


def memory_modes(value: str | Sequence[str], columns: int) -> tuple[Memory, ...]:
    """One memory mode per column, from one for all or a list.

    Raises:
        ArgumentError: an unknown mode, or a list of another length.
    """
    values = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value] * columns
    for item in values:
        if item not in list(Memory):
            raise ArgumentError(
                f"memory mode {item!r} is unknown; choose {', '.join(Memory)}", "memory", code="unknown-choice"
            )
    if len(values) != columns:
        text = f"{len(values)} memory modes for {columns} columns; give one for all or one per column"
        raise ArgumentError(text, "memory", code="wrong-length")
    return tuple(Memory(item) for item in values)


def stored_cells(value: int | Iterable[int], cells: int) -> frozenset[int]:
    """Indices of stored cells, from the indices or from a number of cells counted from the end.

    Raises:
        ArgumentError: there are fewer cells, or none of that index.
    """
    if isinstance(value, int):
        if not 0 <= value <= cells:
            text = f"stored = {value}: give a number of cells, 0 to {cells}, or their indices"
            raise ArgumentError(text, "stored", code="out-of-range")
        value = range(cells - value, cells)
    stored = frozenset(value)
    if not stored <= set(range(cells)):
        text = f"stored: there is no cell {min(stored - set(range(cells)))}; they are 0 to {cells - 1}"
        raise ArgumentError(text, "stored", code="out-of-range")
    return stored


def kept_cells(value: Kept | Iterable[int], cells: int) -> dict[int, int | None]:
    """Cells that keep their state, from a mapping, or from the indices of those that keep the state alone.

    Raises:
        ArgumentError: there is no cell of that index, or a number of tensors is below 0.
    """
    kept: dict[int, int | None] = dict.fromkeys(value)
    if isinstance(value, Mapping):
        kept.update(cast(Kept, value))
    if not kept.keys() <= set(range(cells)):
        text = f"kept: there is no cell {min(kept.keys() - set(range(cells)))}; they are 0 to {cells - 1}"
        raise ArgumentError(text, "kept", code="out-of-range")
    if wrong := [number for number in kept.values() if number is not None and number < 0]:
        text = f"kept: a replay brings back {wrong[0]} tensors; give 0 or more, or None for all"
        raise ArgumentError(text, "kept", code="out-of-range")
    return kept
