# pyright: reportUnnecessaryIsInstance=false
"""Which activations a network keeps for backward: the memory mode of each column, and the policy of all of them."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from operator import index
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
    @property
    def host(self) -> int | str | None: ...
    @property
    def link(self) -> int | str: ...
    @property
    def flops(self) -> float | str | None: ...


Kept: TypeAlias = "Mapping[int, int | None]"
"""Cells that keep the state x_{t-m} that they replace, by index. An integer k: they keep what they save as well, but
for the first k tensors, which a replay brings back. None: they keep the state alone."""

Products: TypeAlias = "Mapping[int, Collection[int]]"
"""Matrix products whose results cells keep, by index of the cell: their numbers in its call, counted from 0."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """What reversible columns keep for backward. It is immutable; `dataclasses.replace` makes another one.

    Raises:
        ArgumentError: an unknown memory mode, or a field has another type.
    """

    modes: tuple[Memory, ...]  # one per column
    stored: frozenset[int] = frozenset()  # indices of cells that keep all they save, whatever their column's mode
    verify: bool = False  # compare what backward rebuilds with checksums of the forward
    budget: Budget | None = None  # pending until the first training forward of the model, see `revnets.keep_budget`
    kept: tuple[tuple[int, int | None], ...] = ()  # items of a `Kept`, in order of the cells
    offloaded: frozenset[int] = frozenset()  # indices of cells that keep in host memory what they keep
    products: tuple[tuple[int, tuple[int, ...]], ...] = ()  # items of a `Products`, in order of the cells

    def __post_init__(self) -> None:
        if not isinstance(self.modes, tuple) or not all(isinstance(mode, Memory) for mode in self.modes):
            object.__setattr__(self, "modes", memory_modes(list(self.modes), len(self.modes)))
        for name, convert in _CONVERSIONS.items():
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, convert(value))
            except (TypeError, ValueError):
                wanted = _WANTED.get(name, "the indices of cells")
                raise ArgumentError(f"{name} = {value!r}: give {wanted}", name, code="wrong-type") from None

    def __setstate__(self, state: list[Any]) -> None:
        # An older pickle ends before the last of them.
        defaults: list[Any] = [(), frozenset(), False, None, (), frozenset(), ()]
        for name, value in zip(self.__slots__, [*state, *defaults[len(state) :]], strict=True):
            object.__setattr__(self, name, value)


def _sorted_items(kept: Kept | Iterable[tuple[int, int | None]]) -> tuple[tuple[int, int | None], ...]:
    return tuple(sorted(dict(kept).items()))


def _sorted_products(
    products: Products | Iterable[tuple[int, Iterable[int]]],
) -> tuple[tuple[int, tuple[int, ...]], ...]:
    items = dict(products).items()
    return tuple(sorted((cell, tuple(sorted(set(numbers)))) for cell, numbers in items if numbers))


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "stored": frozenset,
    "kept": _sorted_items,
    "offloaded": frozenset,
    "products": _sorted_products,
}
_WANTED = {
    "kept": "a mapping of cells to numbers of tensors",
    "products": "a mapping of cells to the numbers of their products, such as {3: [0, 2]}",
}


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
        ArgumentError: there are fewer cells, or none of that index, or the value has another type.
    """
    if isinstance(value, int):
        if not 0 <= value <= cells:
            text = f"stored = {value}: give a number of cells, 0 to {cells}, or their indices"
            raise ArgumentError(text, "stored", code="out-of-range")
        value = range(cells - value, cells)
    return _cells(value, cells, "stored")


def kept_cells(value: Kept | Iterable[int], cells: int) -> dict[int, int | None]:
    """Cells that keep their state, from a mapping, or from the indices of those that keep the state alone.

    Raises:
        ArgumentError: there is no cell of that index, or a number of tensors is below 0, or a value has another type.
    """
    is_mapping = isinstance(value, Mapping)
    kept: dict[Any, Any] = dict(cast(Any, value)) if is_mapping else dict.fromkeys(_cells(value, cells, "kept"))
    _cells(kept.keys(), cells, "kept")
    if wrong := [number for number in kept.values() if number is not None and not hasattr(number, "__index__")]:
        text = f"kept: {wrong[0]!r} is no number of tensors; give a whole number, or None for all"
        raise ArgumentError(text, "kept", code="wrong-type")
    if wrong := [number for number in kept.values() if number is not None and number < 0]:
        text = f"kept: a replay brings back {wrong[0]} tensors; give 0 or more, or None for all"
        raise ArgumentError(text, "kept", code="out-of-range")
    return kept


def products_of_cells(value: Products, cells: int) -> dict[int, tuple[int, ...]]:
    """Numbers of the products that cells keep, sorted.

    Raises:
        ArgumentError: there is no cell of that index, or a number is below 0, or a value has another type.
    """
    try:
        found = {cell: tuple(sorted({index(number) for number in numbers})) for cell, numbers in dict(value).items()}
    except (TypeError, ValueError):
        text = f"products = {reprlib.repr(value)}: give {_WANTED['products']}"
        raise ArgumentError(text, "products", code="wrong-type") from None
    _cells(found.keys(), cells, "products")
    if any(numbers and numbers[0] < 0 for numbers in found.values()):
        raise ArgumentError("products: they are numbered from 0", "products", code="out-of-range")
    return {cell: numbers for cell, numbers in found.items() if numbers}


def offloaded_cells(value: Iterable[int], cells: int) -> frozenset[int]:
    """Indices of offloaded cells.

    Raises:
        ArgumentError: there is no cell of that index, or the value has another type.
    """
    return _cells(value, cells, "offloaded")


def _cells(value: Any, cells: int, name: str) -> frozenset[int]:
    try:
        if isinstance(value, str):
            raise TypeError
        found = frozenset(map(index, value))
    except TypeError:
        text = f"{name} = {value!r}: give the indices of cells, such as [0, 3]"
        raise ArgumentError(text, name, code="wrong-type") from None
    if not found <= set(range(cells)):
        wrong = min(found - set(range(cells)), key=abs)
        shown = wrong if wrong.bit_length() < 64 else f"of {wrong.bit_length()} bits"  # Python prints no huge numbers
        text = f"{name}: there is no cell {shown}; they are 0 to {cells - 1}"
        raise ArgumentError(text, name, code="out-of-range")
    return found
