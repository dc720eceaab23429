"""What a cell may keep, what each way costs, and a choice for all cells as a policy of the columns."""

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
    """A memory mode, and the columns and cells that keep more."""

    mode: str
    stored: tuple[int, ...] = ()  # cells that keep everything
    recomputed: tuple[int, ...] = ()  # columns that keep their states
    kept_cells: tuple[tuple[int, int | None], ...] = ()  # items of `ReversibleColumns.kept`
    offloaded: tuple[int, ...] = ()  # cells that keep in host memory what they keep
    products: tuple[tuple[int, tuple[int, ...]], ...] = ()  # items of `ReversibleColumns.products`

    @property
    def name(self) -> str:
        parts = [
            (self.stored, "cell", "stored"),
            (self.recomputed, "column", "recomputed"),
            ({*dict(self.kept_cells), *dict(self.products)}, "cell", "kept in part"),
            (self.offloaded, "cell", "offloaded"),
        ]
        found = [f"{len(part)} {noun}{'s' if len(part) > 1 else ''} {verb}" for part, noun, verb in parts if part]
        return ", ".join([self.mode, *found])

    def memory(self, columns: int) -> list[str]:
        """The memory mode of each column."""
        return [Memory.RECOMPUTE if column in self.recomputed else self.mode for column in range(columns)]

    def apply(self, columns: ColumnsGroup) -> None:
        """Set it on the columns of a model."""
        columns.memory, columns.stored = self.memory(columns.column_count), self.stored
        columns.kept, columns.offloaded = dict(self.kept_cells), self.offloaded
        columns.products = dict(self.products)


class PolicySpace:
    """What there is to choose from for each cell, in the order of the forward.

    Args:
        uses: of simulated steps in the modes `store`, `recompute` and `exact`.
        costs: of the cells, in the order of the forward.
        columns: of the model.
        peak: bytes that may be alive at once in such a step.
        corrections: bytes to add to the peak around each cell, and to that behind all of them; by default none.

    Attributes:
        options: of each cell.
        room: bytes that all cells together may keep.
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
        # Where lost bits fit, they are known to; with host memory, a peak below that of `exact` is possible.
        capped = [min(known, max(peak - highest, 0)) for known, highest in zip(more, least, strict=True)]
        self.rooms[Memory.EXACT] = self._rooms(uses[Memory.EXACT], capped)
        self.room = self.rooms[Memory.EXACT][-1]
        cells = columns.flat()
        self.options = [self._options(place, cost, cells[index]) for place, (index, cost) in enumerate(costs.items())]

    def _rooms(self, uses: CellUses, corrections: Sequence[int]) -> list[int]:
        """What the cells before each one may keep, and all together in the last entry."""
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
        if any(map(is_compiled, cell.modules())):  # saves other tensors than the simulation, which runs it as written
            return [*found, everything]
        kept, room = found[-1].kept, self.rooms[Memory.RECOMPUTE][place]
        ends = [tensor.work for tensor in cost.saved]  # of a replay that brings back so many tensors and one more
        rest = list(_with_products(found[0], cost.products, cost.work))  # the replay rebuilds x_{t-m} from all of F_t
        if cell.gain is not None and ends:
            rest += _with_products(found[1], cost.products, ends[-1])
        for replayed in range(len(ends) - 1, 0, -1):
            kept += cost.saved[replayed].nbytes
            if cost.saved[replayed].nbytes and ends[replayed - 1]:
                one = Option(kept, everything.work + ends[replayed - 1], room, replayed)
                rest += [one, *_with_products(one, cost.products, ends[replayed - 1])]
        return [*found, *_least_work(found, rest, everything), everything]

    def peaks(self, choice: Sequence[Option]) -> list[int]:
        """The peak around each cell, and behind all of them, that is expected of a choice of one option for each."""
        before = accumulate((option.kept for option in choice), initial=0)
        rooms = [*(option.room for option in choice), self.room]
        return [self.peak - room + kept for room, kept in zip(rooms, before, strict=True)]

    def policy(self, choice: Sequence[Option]) -> CellPolicy:
        """The choice of one option for each cell as a policy.

        Where all cells of a column that are not stored keep their state alone, the column is recomputed.
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
    """The option with results of products kept: of one, of two, and so on, those first that save the most for a byte.

    Args:
        products: of the cell.
        end: work of the cell when its replay ends; what comes later is not computed again anyway.
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
    """The options that take less work than all that keep less, and more than keeping everything."""
    found: list[Option] = []
    least = None
    for option in sorted((*bases, *options), key=lambda option: (option.kept, option.work)):
        if option.kept < everything.kept and everything.work < option.work and (least is None or option.work < least):
            found.append(option)
            least = option.work
    return [option for option in found if option not in bases]
