# pyright: reportUnnecessaryIsInstance=false
"""Which activations a network keeps for backward: the memory mode of each column and the policy of all columns."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from operator import index
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from revnets.engine.errors import ArgumentError
from revnets.engine.graph import Graph

if TYPE_CHECKING:
    from revnets.engine.budget import Budget


class Memory(StrEnum):
    """How backward recovers x_{t-m}, the state that cell t replaces.

    Attributes:
        STORE: Autograd keeps it and everything the cell saves; there is no replay.
        RECOMPUTE: The tape keeps it and replays the cell.
        INVERT: The inverse alone rebuilds it; rounding errors accumulate.
        EXACT: The inverse and the lost bits (the rounding residual of the coupling) rebuild it bit for bit.
    """

    STORE = "store"
    RECOMPUTE = "recompute"
    INVERT = "invert"
    EXACT = "exact"


Kept: TypeAlias = "Mapping[int, int | None]"
"""Cells that keep the state x_{t-m} that they replace, by index. With an integer k, a cell also keeps its saved
tensors except the first k, which a replay restores. With None, it keeps only the state."""

Products: TypeAlias = "Mapping[int, Collection[int]]"
"""Matrix products whose results cells keep: for each index of a cell, positions in its call, counted from 0."""


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """What reversible columns keep for backward. Immutable; `dataclasses.replace` returns a changed copy.

    Attributes:
        modes: Memory mode of each column.
        stored: Indices of cells that keep everything autograd saves, regardless of the mode of their column.
        verify: Compare what backward rebuilds with checksums of the forward pass.
        budget: Pending until the first training forward pass of the model, see `revnets.keep_budget`.
        kept: Items of a `Kept`, sorted by cell.
        offloaded: Indices of cells that hold in host memory what they keep.
        products: Items of a `Products`, sorted by cell.

    Raises:
        ArgumentError: If a memory mode is unknown, or a field has the wrong type.
    """

    modes: tuple[Memory, ...]
    stored: frozenset[int] = frozenset()
    verify: bool = False
    budget: Budget | None = None
    kept: tuple[tuple[int, int | None], ...] = ()
    offloaded: frozenset[int] = frozenset()
    products: tuple[tuple[int, tuple[int, ...]], ...] = ()

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
        # Older pickles lack the last fields.
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
    "kept": "a mapping from cells to numbers of tensors",
    "products": "a mapping from cells to positions of their products, such as {3: [0, 2]}",
}


class PolicyAttributes:
    """Attributes of columns that read and set their memory policy."""

    graph: Graph
    _policy: MemoryPolicy

    @property
    def policy(self) -> MemoryPolicy:
        """What the columns keep for backward.

        Raises:
            ArgumentError: (on assignment) the number of modes is not that of the columns, or a cell does not exist.
        """
        return self._policy

    @policy.setter
    def policy(self, value: MemoryPolicy) -> None:
        memory_modes(value.modes, self.graph.columns)
        stored_cells(value.stored, len(self.graph.nodes))
        kept_cells(dict(value.kept), len(self.graph.nodes))
        offloaded_cells(value.offloaded, len(self.graph.nodes))
        products_of_cells(dict(value.products), len(self.graph.nodes))
        self._policy = value

    @contextmanager
    def using(
        self,
        policy: MemoryPolicy | None = None,
        *,
        modes: str | Sequence[str] | None = None,
        stored: int | Iterable[int] | None = None,
        kept: Kept | Iterable[int] | None = None,
        verify: bool | None = None,
        offloaded: Iterable[int] | None = None,
        products: Products | None = None,
    ) -> Generator[MemoryPolicy]:
        """Use another policy in a `with` block, and restore the current one at its end.

        Args:
            policy: Replaces the current policy before the changes below; by default the current policy.
            modes: Assigned to `memory`. A pending budget is not planned inside the block.
            stored: Assigned to `stored`.
            kept: Assigned to `kept`.
            verify: Assigned to `verify`.
            offloaded: Assigned to `offloaded`.
            products: Assigned to `products`.

        Yields:
            The policy in effect.

        Raises:
            ArgumentError: If a value is invalid for its attribute.

        Example:
            >>> with model.columns.using(modes="store"):
            ...     loss(model(x), y).backward()  # plain autograd
        """
        current = self._policy
        changes = {"policy": policy, "memory": modes, "stored": stored, "kept": kept, "verify": verify}
        changes |= {"offloaded": offloaded, "products": products}
        try:
            for name, value in changes.items():
                if value is not None:
                    setattr(self, name, value)
            yield self._policy
        finally:
            self._policy = current

    @property
    def memory(self) -> tuple[Memory, ...]:
        """The memory mode of each column.

        Set it to one mode for all columns or to one per column. This resets all but `stored` and `verify`.
        """
        return self._policy.modes

    @memory.setter
    def memory(self, value: str | Sequence[str]) -> None:
        modes = memory_modes(value, self.graph.columns)
        self._policy = MemoryPolicy(modes, self._policy.stored, self._policy.verify)

    @property
    def stored(self) -> frozenset[int]:
        """Indices t of cells that keep everything autograd saves and are not replayed, regardless of their column.

        Set it to indices, or to a number of cells counted from the end. `revnets.plan` finds the cells that save the
        most compute under a budget.
        """
        return self._policy.stored

    @stored.setter
    def stored(self, value: int | Iterable[int]) -> None:
        self._policy = replace(self._policy, stored=stored_cells(value, len(self.graph.nodes)))

    @property
    def kept(self) -> dict[int, int | None]:
        """Cells (by index t) that keep the state they replace instead of its lost bits.

        The value is the number k of saved tensors that a replay restores; the cell keeps the others. With None, a
        replay restores all. Set it to such a mapping, or to the indices of cells that keep only the state.
        """
        return dict(self._policy.kept)

    @kept.setter
    def kept(self, value: Kept | Iterable[int]) -> None:
        kept = tuple(kept_cells(value, len(self.graph.nodes)).items())
        self._policy = replace(self._policy, kept=kept)

    @property
    def offloaded(self) -> frozenset[int]:
        """Indices t of cells that hold in host memory what they keep for backward.

        For stored cells these are the tensors that autograd saves, for other cells the lost bits or the state.
        """
        return self._policy.offloaded

    @offloaded.setter
    def offloaded(self, value: Iterable[int]) -> None:
        self._policy = replace(self._policy, offloaded=offloaded_cells(value, len(self.graph.nodes)))

    @property
    def products(self) -> dict[int, tuple[int, ...]]:
        """Matrix products whose results cells (by index t) keep, so that a replay skips them.

        Set it to a mapping from cells to positions. Convolutions, matrix products and attention without dropout are
        numbered from 0 in the order of the cell's call; a position after the last one has no effect. Compiled and
        stored cells ignore the setting. It does not change a bit of the gradients.
        """
        return dict(self._policy.products)

    @products.setter
    def products(self, value: Products) -> None:
        products = tuple(products_of_cells(value, len(self.graph.nodes)).items())
        self._policy = replace(self._policy, products=products)

    @property
    def verify(self) -> bool:
        """Whether backward compares what it rebuilds with checksums of the forward pass."""
        return self._policy.verify

    @verify.setter
    def verify(self, value: bool) -> None:
        self._policy = replace(self._policy, verify=value)

    @property
    def budget(self) -> Budget | None:
        """A memory budget, pending until the first training forward pass of the model; see `revnets.keep_budget`."""
        return self._policy.budget

    @budget.setter
    def budget(self, value: Budget | None) -> None:
        self._policy = replace(self._policy, budget=value)


def memory_modes(value: str | Sequence[str], columns: int) -> tuple[Memory, ...]:
    """Return one memory mode per column, from one mode for all columns or a list.

    Raises:
        ArgumentError: If a mode is unknown, or the list has the wrong length.
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
    """Return the indices of stored cells, from indices or a number of cells counted from the end.

    Raises:
        ArgumentError: If there are too few cells, an index does not exist, or the value has the wrong type.
    """
    if isinstance(value, int):
        if not 0 <= value <= cells:
            text = f"stored = {value}: give a number of cells, 0 to {cells}, or their indices"
            raise ArgumentError(text, "stored", code="out-of-range")
        value = range(cells - value, cells)
    return _cells(value, cells, "stored")


def kept_cells(value: Kept | Iterable[int], cells: int) -> dict[int, int | None]:
    """Return the cells that keep their state, from a mapping or the indices of cells that keep only the state.

    Raises:
        ArgumentError: If an index does not exist, a number of tensors is negative, or a value has the wrong type.
    """
    is_mapping = isinstance(value, Mapping)
    kept: dict[Any, Any] = dict(cast(Any, value)) if is_mapping else dict.fromkeys(_cells(value, cells, "kept"))
    _cells(kept.keys(), cells, "kept")
    if wrong := [number for number in kept.values() if number is not None and not hasattr(number, "__index__")]:
        text = f"kept: {wrong[0]!r} is not a number of tensors; give an integer, or None for all"
        raise ArgumentError(text, "kept", code="wrong-type")
    if wrong := [number for number in kept.values() if number is not None and number < 0]:
        text = f"kept: a replay cannot restore {wrong[0]} tensors; give 0 or more, or None for all"
        raise ArgumentError(text, "kept", code="out-of-range")
    return kept


def products_of_cells(value: Products, cells: int) -> dict[int, tuple[int, ...]]:
    """Return the sorted positions of the products that cells keep.

    Raises:
        ArgumentError: If an index does not exist, a position is negative, or a value has the wrong type.
    """
    try:
        found = {cell: tuple(sorted({index(number) for number in numbers})) for cell, numbers in dict(value).items()}
    except (TypeError, ValueError):
        text = f"products = {reprlib.repr(value)}: give {_WANTED['products']}"
        raise ArgumentError(text, "products", code="wrong-type") from None
    _cells(found.keys(), cells, "products")
    if any(numbers and numbers[0] < 0 for numbers in found.values()):
        raise ArgumentError("products: positions start at 0; none may be negative", "products", code="out-of-range")
    return {cell: numbers for cell, numbers in found.items() if numbers}


def offloaded_cells(value: Iterable[int], cells: int) -> frozenset[int]:
    """Return the indices of offloaded cells; raise an `ArgumentError` if they are invalid."""
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
        shown = wrong if wrong.bit_length() < 64 else f"of {wrong.bit_length()} bits"  # Python limits long numbers
        text = f"{name}: there is no cell {shown}; cells are numbered 0 to {cells - 1}"
        raise ArgumentError(text, name, code="out-of-range")
    return found
