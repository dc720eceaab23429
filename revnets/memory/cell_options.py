"""The options of each cell (what it saves for backward and what that costs), and a choice for all cells as a policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from revnets.engine.cell import Cell
from revnets.engine.columns_group import ColumnsGroup
from revnets.engine.memory_mode import Memory
from revnets.engine.torch_internals import is_compiled
from revnets.memory.policy_search import ALL, LOST, STATE, Option
from revnets.memory.saved_tensors import CellCost
from revnets.memory.step_record import CellUses
from revnets.memory.tracker import Product


@dataclass(frozen=True, slots=True)
class CellPolicy:
    """A memory mode, and the columns and cells that save more than it does.

    Attributes:
        mode: Memory mode of all other columns and cells.
        stored: Indices of the cells that save everything.
        recomputed: Indices of the columns that save their states.
        kept_cells: Items of `ReversibleColumns.kept`.
        offloaded: Indices of the cells that move what they save to host memory.
        products: Items of `ReversibleColumns.products`.
    """

    mode: str
    stored: tuple[int, ...] = ()
    recomputed: tuple[int, ...] = ()
    kept_cells: tuple[tuple[int, int | None], ...] = ()
    offloaded: tuple[int, ...] = ()
    products: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def name(self) -> str:
        """The policy in words, such as `exact, 2 cells stored`."""
        parts = [
            (self.stored, "cell", "stored"),
            (self.recomputed, "column", "recomputed"),
            ({*dict(self.kept_cells), *dict(self.products)}, "cell", "kept in part"),
            (self.offloaded, "cell", "offloaded"),
        ]
        found = [f"{len(part)} {noun}{'s' if len(part) > 1 else ''} {verb}" for part, noun, verb in parts if part]
        return ", ".join([self.mode, *found])

    def memory(self, columns: int) -> list[str]:
        """Return the memory mode of each column."""
        return [Memory.RECOMPUTE if column in self.recomputed else self.mode for column in range(columns)]

    def apply(self, columns: ColumnsGroup) -> None:
        """Set the policy on the columns of a model."""
        columns.memory, columns.stored = self.memory(columns.column_count), self.stored
        columns.kept, columns.offloaded = dict(self.kept_cells), self.offloaded
        columns.products = dict(self.products)


class PolicySpace:
    """The options of each cell, in the order of the forward pass.

    Args:
        uses: Uses of the cells in simulated steps, by mode: `store`, `recompute` and `exact`.
        costs: Costs of the cells, in the order of the forward pass.
        columns: Reversible columns of the model.
        peak: Largest allowed number of bytes alive at once in such a step.
        corrections: Bytes to add to the expected peak around each cell, and after the last cell. Zeros by default.

    Attributes:
        options: Options of each cell.
        room: Bytes that all cells together may keep.
    """

    def __init__(
        self,
        uses: Mapping[str, CellUses],
        costs: Mapping[int, CellCost],
        columns: ColumnsGroup,
        peak: int,
        corrections: Sequence[int] = (),
    ):
        self.uses, self.columns, self.peak = uses, columns, peak
        self.indices = tuple(costs)
        least = uses[Memory.EXACT].peaks
        more = corrections or [0] * len(least)
        self.rooms = {mode: self._rooms(found, more) for mode, found in uses.items()}
        # In mode `exact`, the simulated step itself fits under its peak. With host memory, a lower peak is possible.
        capped = [min(known, max(peak - highest, 0)) for known, highest in zip(more, least, strict=True)]
        self.rooms[Memory.EXACT] = self._rooms(uses[Memory.EXACT], capped)
        self.room = self.rooms[Memory.EXACT][-1]
        cells = columns.flat()
        self.options = [self._options(place, cost, cells[index]) for place, (index, cost) in enumerate(costs.items())]

    def _rooms(self, uses: CellUses, corrections: Sequence[int]) -> list[int]:
        """Bytes that the cells before each cell may keep; the last entry is for all cells."""
        before = accumulate(uses.kept, initial=0)
        return [
            self.peak - highest - more + kept
            for highest, more, kept in zip(uses.peaks, corrections, before, strict=True)
        ]

    def _options(self, place: int, cost: CellCost, cell: Cell) -> list[Option]:
        def option(mode: str, replayed: int | None) -> Option:
            use = self.uses[mode]
            return Option(use.kept[place], use.work[place], self.rooms[mode][place], replayed)

        everything = option(Memory.STORE, ALL)
        found = [option(Memory.EXACT, LOST)]
        if cell.gain is not None:
            found.append(option(Memory.RECOMPUTE, STATE))
        # A compiled cell saves other tensors than the simulation, which runs it in eager mode.
        if any(map(is_compiled, cell.modules())):
            return [*found, everything]
        kept, room = found[-1].kept, self.rooms[Memory.RECOMPUTE][place]
        ends = [tensor.work for tensor in cost.saved]  # entry k: cost of a replay that restores k + 1 tensors
        rest = list(_with_products(found[0], cost.products, cost.work))  # this replay needs all of F_t for x_{t-m}
        if cell.gain is not None and ends:
            rest += _with_products(found[1], cost.products, ends[-1])
        for replayed in range(len(ends) - 1, 0, -1):
            kept += cost.saved[replayed].nbytes
            if cost.saved[replayed].nbytes and ends[replayed - 1]:
                one = Option(kept, everything.work + ends[replayed - 1], room, replayed)
                rest += [one, *_with_products(one, cost.products, ends[replayed - 1])]
        return [*found, *_least_work(found, rest, everything), everything]

    def peaks(self, choice: Sequence[Option]) -> list[int]:
        """Return the expected peak around each cell, and after the last one, for one option per cell."""
        before = accumulate((option.kept for option in choice), initial=0)
        rooms = [*(option.room for option in choice), self.room]
        return [self.peak - room + kept for room, kept in zip(rooms, before, strict=True)]

    def policy(self, choice: Sequence[Option]) -> CellPolicy:
        """Return the policy for one option per cell.

        A column becomes `recomputed` if all of its cells that are not stored save only their state.
        """
        replayed = {index: option.replayed for index, option in zip(self.indices, choice, strict=True)}
        stored = {index for index, how in replayed.items() if how == ALL}
        kept = {index: how for index, how in replayed.items() if how not in (ALL, LOST)}
        members: dict[int, list[int]] = {}
        for index, column in enumerate(self.columns.column_of_cell):
            members.setdefault(column, []).append(index)
        recomputed: list[int] = []
        for column, cells in members.items():
            rest = [index for index in cells if index not in stored]
            is_first = column in self.columns.first_columns
            if rest and not is_first and all(kept.get(index, LOST) is STATE for index in rest):
                recomputed.append(column)
                kept = {index: how for index, how in kept.items() if index not in rest}
        offloaded = tuple(index for index, option in zip(self.indices, choice, strict=True) if option.host)
        products = tuple((index, one.products) for index, one in zip(self.indices, choice, strict=True) if one.products)
        ways = tuple(sorted(stored)), tuple(recomputed), tuple(sorted(kept.items())), tuple(sorted(offloaded))
        return CellPolicy("exact", *ways, products)


def _with_products(option: Option, products: Sequence[Product], end: int) -> Iterator[Option]:
    """Yield the option with the results of one matrix product saved, of two, and so on.

    Products that save the most compute per byte come first.

    Args:
        option: Option of the cell without saved products.
        products: Matrix products of the cell.
        end: Compute cost of the cell up to the end of its replay. Later products are not recomputed.
    """
    replayed = [number for number, product in enumerate(products) if product.end <= end and product.nbytes]
    replayed.sort(key=lambda number: products[number].work / products[number].nbytes, reverse=True)
    for number in replayed:
        option = option._replace(
            kept=option.kept + products[number].nbytes,
            work=option.work - products[number].work,
            products=tuple(sorted((*option.products, number))),
        )
        yield option


def _least_work(bases: Sequence[Option], options: Iterable[Option], everything: Option) -> list[Option]:
    """Return the options, without `bases`, that are cheaper than all smaller ones and smaller than `everything`."""
    found: list[Option] = []
    least = None
    for option in sorted((*bases, *options), key=lambda option: (option.kept, option.work)):
        if option.kept < everything.kept and everything.work < option.work and (least is None or option.work < least):
            found.append(option)
            least = option.work
    return [option for option in found if option not in bases]
