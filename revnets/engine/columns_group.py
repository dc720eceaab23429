"""All reversible columns of a model under one policy: a pretrained network has one sequence of blocks per stage."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate, cycle, pairwise
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from torch import nn

from revnets.engine.cell import Cell
from revnets.engine.columns import ReversibleColumns
from revnets.engine.errors import ArgumentError
from revnets.engine.memory_mode import (
    Kept,
    Memory,
    MemoryPolicy,
    Products,
    kept_cells,
    memory_modes,
    offloaded_cells,
    products_of_cells,
    stored_cells,
)

if TYPE_CHECKING:
    from revnets.engine.budget import Budget

T = TypeVar("T")


class ColumnsGroup(Sequence[ReversibleColumns]):
    """An immutable sequence of `ReversibleColumns` whose attributes apply to all members together.

    Columns and cells are numbered continuously: those of the second member follow those of the first.

    Args:
        members: Columns in the order in which the model runs them.

    Example:
        >>> group = revnets.find_columns(model)
        >>> group.memory = "exact"  # all columns of all members
        >>> group.stored = 5  # the last five cells of the model
        >>> group[0].memory = "store"  # only the first member
    """

    def __init__(self, members: Iterable[ReversibleColumns]):
        self._members = tuple(members)

    def __len__(self) -> int:
        return len(self._members)

    @overload
    def __getitem__(self, index: int) -> ReversibleColumns: ...
    @overload
    def __getitem__(self, index: slice) -> ColumnsGroup: ...

    def __getitem__(self, index: int | slice) -> ReversibleColumns | ColumnsGroup:
        return ColumnsGroup(self._members[index]) if isinstance(index, slice) else self._members[index]

    def __iter__(self) -> Iterator[ReversibleColumns]:
        return iter(self._members)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} members, {self.column_count} columns, {self.cell_count} cells)"

    @property
    def column_count(self) -> int:
        """Number of columns of all members."""
        return sum(columns.graph.columns for columns in self)

    @property
    def cell_count(self) -> int:
        """Number of cells of all members."""
        return sum(len(columns.graph.nodes) for columns in self)

    @property
    def first_columns(self) -> tuple[int, ...]:
        """Index of each member's first column."""
        return tuple(start for start, _ in self._spans(lambda columns: columns.graph.columns))

    @property
    def column_of_cell(self) -> list[int]:
        """Index of each cell's column."""
        starts = zip(self, self.first_columns, strict=True)
        return [first + node.column for columns, first in starts for node in columns.graph.nodes]

    @property
    def policy(self) -> MemoryPolicy:
        """The policies of all members as one. An invalid value changes no member.

        Raises:
            ArgumentError: (on assignment) the number of modes is not that of the columns, or a cell does not exist.
        """
        kept, products = tuple(self.kept.items()), tuple(self.products.items())
        return MemoryPolicy(self.memory, self.stored, self.verify, self.budget, kept, self.offloaded, products)

    @policy.setter
    def policy(self, value: MemoryPolicy) -> None:
        memory_modes(value.modes, self.column_count)
        stored_cells(value.stored, self.cell_count)
        kept = kept_cells(dict(value.kept), self.cell_count)
        offloaded = offloaded_cells(value.offloaded, self.cell_count)
        products = products_of_cells(dict(value.products), self.cell_count)
        self.memory, self.stored, self.kept, self.offloaded = value.modes, value.stored, kept, offloaded
        self.products = products
        self.verify, self.budget = value.verify, value.budget

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
        """Use another policy for all members in a `with` block, and restore the current ones at its end.

        Args:
            policy: Replaces the current policies before the changes below; by default the current policies.
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
        """
        changes = {"policy": policy, "memory": modes, "stored": stored, "kept": kept, "verify": verify}
        changes |= {"offloaded": offloaded, "products": products}
        with ExitStack() as stack:
            for columns in self:
                stack.enter_context(columns.using())
            for name, value in changes.items():
                if value is not None:
                    setattr(self, name, value)
            yield self.policy

    @property
    def memory(self) -> tuple[Memory, ...]:
        """The memory mode of each column, see `ReversibleColumns.memory`."""
        return tuple(mode for columns in self for mode in columns.memory)

    @memory.setter
    def memory(self, value: str | Sequence[str]) -> None:
        modes = memory_modes(value, self.column_count)
        for columns, (start, stop) in zip(self, self._spans(lambda c: c.graph.columns), strict=True):
            columns.memory = modes[start:stop]

    @property
    def stored(self) -> frozenset[int]:
        """Indices of cells that keep everything autograd saves, see `ReversibleColumns.stored`."""
        return self._joined([columns.stored for columns in self])

    @stored.setter
    def stored(self, value: int | Iterable[int]) -> None:
        for columns, part in zip(self, self._parted(stored_cells(value, self.cell_count)), strict=True):
            columns.stored = part

    @property
    def offloaded(self) -> frozenset[int]:
        """Indices of cells that hold in host memory what they keep, see `ReversibleColumns.offloaded`."""
        return self._joined([columns.offloaded for columns in self])

    @offloaded.setter
    def offloaded(self, value: Iterable[int]) -> None:
        for columns, part in zip(self, self._parted(offloaded_cells(value, self.cell_count)), strict=True):
            columns.offloaded = part

    @property
    def kept(self) -> dict[int, int | None]:
        """Cells that keep the state they replace, see `ReversibleColumns.kept`."""
        return self._joined_items([columns.kept for columns in self])

    @kept.setter
    def kept(self, value: Kept | Iterable[int]) -> None:
        for columns, part in zip(self, self._parted_items(kept_cells(value, self.cell_count)), strict=True):
            columns.kept = part

    @property
    def products(self) -> dict[int, tuple[int, ...]]:
        """Matrix products whose results cells keep, see `ReversibleColumns.products`."""
        return self._joined_items([columns.products for columns in self])

    @products.setter
    def products(self, value: Products) -> None:
        for columns, part in zip(self, self._parted_items(products_of_cells(value, self.cell_count)), strict=True):
            columns.products = part

    @property
    def verify(self) -> bool:
        """Whether all members compare what backward rebuilds with checksums of the forward pass."""
        return all(columns.verify for columns in self)

    @verify.setter
    def verify(self, value: bool) -> None:
        for columns in self:
            columns.verify = value

    @property
    def budget(self) -> Budget | None:
        """The memory budget of the whole model while it is pending for a member; see `revnets.keep_budget`."""
        return next((columns.budget for columns in self if columns.budget is not None), None)

    @budget.setter
    def budget(self, value: Budget | None) -> None:
        for columns in self:
            columns.budget = value

    def flat(self) -> list[Cell]:
        """Return all cells, those of the first member first."""
        return [cell for columns in self for cell in columns.flat()]

    def call_indices(self) -> dict[Cell, Iterator[int]]:
        """Return an endless iterator over the indices of each cell's calls; several columns may share a cell."""
        calls: dict[Cell, list[int]] = {}
        for index, cell in enumerate(self.flat()):
            calls.setdefault(cell, []).append(index)
        return {cell: cycle(indices) for cell, indices in calls.items()}

    def _joined(self, parts: Iterable[Iterable[int]]) -> frozenset[int]:
        """Convert indices of cells in each member to indices in the group."""
        starts = (start for start, _ in self._spans(_cells_of))
        return frozenset(start + index for part, start in zip(parts, starts, strict=True) for index in part)

    def _parted(self, cells: Iterable[int]) -> list[frozenset[int]]:
        """Convert indices of cells in the group to indices in each member."""
        spans = self._spans(_cells_of)
        return [frozenset(index - start for index in cells if start <= index < stop) for start, stop in spans]

    def _joined_items(self, parts: Iterable[Mapping[int, T]]) -> dict[int, T]:
        """Like `_joined`, for mappings from cells."""
        starts = (start for start, _ in self._spans(_cells_of))
        return {start + index: item for part, start in zip(parts, starts, strict=True) for index, item in part.items()}

    def _parted_items(self, items: Mapping[int, T]) -> list[dict[int, T]]:
        """Like `_parted`, for mappings from cells."""
        spans = self._spans(_cells_of)
        return [
            {index - start: item for index, item in items.items() if start <= index < stop} for start, stop in spans
        ]

    def _spans(self, count: Callable[[ReversibleColumns], int]) -> list[tuple[int, int]]:
        """Return the range (start, stop) of each member's columns or cells in the group."""
        return list(pairwise(accumulate((count(columns) for columns in self), initial=0)))


def _cells_of(columns: ReversibleColumns) -> int:
    return len(columns.graph.nodes)


def find_columns(model: nn.Module) -> ColumnsGroup:
    """Return the reversible columns of a model: the model itself, its attribute `columns`, or those of its submodules.

    Columns inside a cell of other columns are omitted. Networks rewired by `revnets.make_reversible` are supported.

    Args:
        model: A model with reversible columns.

    Returns:
        The columns in the order in which the model lists its submodules.

    Raises:
        ArgumentError: If the model has no reversible columns.
    """
    for candidate in (model, getattr(model, "columns", None)):
        if isinstance(candidate, ColumnsGroup):
            return candidate
        if isinstance(candidate, ReversibleColumns):
            return ColumnsGroup([candidate])
    found = dict.fromkeys(_outermost(model, set()))
    if not found:
        text = f"{type(model).__name__} has no reversible columns"
        raise ArgumentError(text, "model", code="no-columns")
    return ColumnsGroup(found)


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, including those of sequences that are not among its submodules."""
    registered = list(model.modules())
    roots = (model, *filter(None, map(_sequence_of, registered)))
    return list(dict.fromkeys(module for root in roots for module in root.modules()))


def _outermost(module: nn.Module, seen: set[nn.Module]) -> Iterator[ReversibleColumns]:
    if module in seen:
        return
    seen.add(module)
    if (columns := module if isinstance(module, ReversibleColumns) else _sequence_of(module)) is not None:
        yield columns
        return
    for child in module.children():
        yield from _outermost(child, seen)


def _sequence_of(block: nn.Module) -> ReversibleColumns | None:
    """Return the sequence that runs this block as a cell, the attribute `sequence` of its `_reversible_call`."""
    call: Any = vars(block).get("_reversible_call")
    return None if call is None else cast(ReversibleColumns, call.sequence)
