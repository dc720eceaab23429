# pyright: reportUnnecessaryIsInstance=false
"""Which activations a network keeps for backward: the memory mode of each column, and the policy of all of them."""

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
    """How the state x_{t-m}, which cell t replaces, comes back in backward."""

    STORE = "store"  # autograd keeps it, and all that the cell saves: no replay
    RECOMPUTE = "recompute"  # the tape keeps it; the cell is replayed
    INVERT = "invert"  # rebuilt by the inverse alone; rounding errors add up
    EXACT = "exact"  # rebuilt by the inverse and the lost bits, bit for bit


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


class PolicyAttributes:
    """The attributes by which columns show and change their memory policy."""

    graph: Graph
    _policy: MemoryPolicy

    @property
    def policy(self) -> MemoryPolicy:
        """What is kept for backward.

        Raises:
            ArgumentError: (when set) another number of modes than columns, or a stored cell that does not exist.
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
        """Run a `with` block under another policy; the present one returns at its end, also after an exception.

        Args:
            policy: the other policy; by default the present one with the changes below.
            modes: as for the attribute `memory`. A pending budget is not planned inside of the block.
            stored: as for the attribute `stored`.
            kept: as for the attribute `kept`.
            verify: as for the attribute `verify`.
            offloaded: as for the attribute `offloaded`.
            products: as for the attribute `products`.

        Raises:
            ArgumentError: as the attributes do.
        """
        found = self._policy
        try:
            if policy is not None:
                self.policy = policy
            if modes is not None:
                self.memory = modes
            if stored is not None:
                self.stored = stored
            if kept is not None:
                self.kept = kept
            if verify is not None:
                self.verify = verify
            if offloaded is not None:
                self.offloaded = offloaded
            if products is not None:
                self.products = products
            yield self._policy
        finally:
            self._policy = found

    @property
    def memory(self) -> tuple[Memory, ...]:
        """The memory mode of each column.

        Setting one for all or one per column ends a pending budget, `kept`, `offloaded` and `products`.
        """
        return self._policy.modes

    @memory.setter
    def memory(self, value: str | Sequence[str]) -> None:
        modes = memory_modes(value, self.graph.columns)
        self._policy = MemoryPolicy(modes, self._policy.stored, self._policy.verify)

    @property
    def stored(self) -> frozenset[int]:
        """Cells (by their index t) that keep all they save, whatever their column's mode says: no replay.

        Set it to their indices, or to a number of cells counted from the end. `revnets.plan` finds those that save the
        most work under a budget.
        """
        return self._policy.stored

    @stored.setter
    def stored(self, value: int | Iterable[int]) -> None:
        self._policy = replace(self._policy, stored=stored_cells(value, len(self.graph.nodes)))

    @property
    def kept(self) -> dict[int, int | None]:
        """Cells (by their index t) that keep the state that they replace in place of its lost bits.

        The value says how much a replay brings back: None is all that the cell saves, an integer k its first k tensors;
        the others stay. Set it to such a mapping, or to indices of cells that keep the state alone.
        """
        return dict(self._policy.kept)

    @kept.setter
    def kept(self, value: Kept | Iterable[int]) -> None:
        kept = tuple(kept_cells(value, len(self.graph.nodes)).items())
        self._policy = replace(self._policy, kept=kept)

    @property
    def offloaded(self) -> frozenset[int]:
        """Cells (by their index t) that keep in host memory what they keep for backward. Set it to their indices.

        Of stored cells these are the tensors that autograd saves, of others the lost bits or the state.
        """
        return self._policy.offloaded

    @offloaded.setter
    def offloaded(self, value: Iterable[int]) -> None:
        self._policy = replace(self._policy, offloaded=offloaded_cells(value, len(self.graph.nodes)))

    @property
    def products(self) -> dict[int, tuple[int, ...]]:
        """Matrix products whose results cells (by their index t) keep, so that a replay does not compute them again.

        Convolutions, matrix products and attention without dropout count, from 0 in the order of the cell's call. Set
        it to a mapping of cells to such numbers; a number beyond the last product keeps nothing. Compiled and stored
        cells do without. Gradients are the same bits with any of them.
        """
        return dict(self._policy.products)

    @products.setter
    def products(self, value: Products) -> None:
        products = tuple(products_of_cells(value, len(self.graph.nodes)).items())
        self._policy = replace(self._policy, products=products)

    @property
    def verify(self) -> bool:
        """Compare what backward rebuilds with checksums of the forward."""
        return self._policy.verify

    @verify.setter
    def verify(self, value: bool) -> None:
        self._policy = replace(self._policy, verify=value)

    @property
    def budget(self) -> Budget | None:
        """A memory budget that is pending until the first training forward of the model, see `revnets.keep_budget`."""
        return self._policy.budget

    @budget.setter
    def budget(self, value: Budget | None) -> None:
        self._policy = replace(self._policy, budget=value)


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
