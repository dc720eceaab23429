"""How the bytes and the work of one training step divide among the cells of a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from revnets.engine.cell import Cell
from revnets.engine.columns_group import find_columns
from revnets.engine.errors import ArgumentError
from revnets.engine.memory_mode import Memory
from revnets.engine.replay.threads import is_replaying
from revnets.memory.tracker import MemoryTracker, OpCounter


@dataclass(frozen=True, slots=True)
class CellUses:
    """What the cells of a model keep, and the peak around each, in the order in which the forward comes to them.

    Entry k of `peaks` is the most bytes alive at once while the forward goes from the end of cell k - 1 to that of
    cell k, or backward is at cell k: whenever cells 0 to k - 1 hold what they keep, and those from k + 1 on nothing.
    One more entry is for what lies between the last cell and its backward, such as the head and the loss.
    """

    indices: tuple[int, ...]  # numbers of the cells (`ColumnsGroup.stored`)
    kept: tuple[int, ...]  # bytes that each cell's backward sets free, without those of the gradients that it makes
    work: tuple[int, ...]  # of forward, backward and replay, in units of `OpCounter.work`
    peaks: tuple[int, ...]


class StepRecord:
    """Follows one forward and backward of a model.

    Args:
        model: with reversible columns or without; its cells get hooks that stay, so it should be a copy.
        tracker, counter: count the step.
    """

    def __init__(self, model: nn.Module, tracker: MemoryTracker, counter: OpCounter):
        self.tracker, self.counter = tracker, counter
        self.order: list[int] = []
        self.kept: Counter[int] = Counter()
        self.work: Counter[int] = Counter()
        self.peaks: Counter[int] = Counter()
        self.behind = 0  # the peak between the last cell and its backward
        self.running = 0  # the cell that was called last
        self.cell: int | None = None  # to which the time since the last event belongs; None if to none
        self.live = 0  # bytes at the last event of backward
        self.seen_work = counter.work
        try:
            columns = find_columns(model)
        except ArgumentError:  # a model without columns has no cells
            return
        self.calls = columns.call_indices()
        self.is_taped = any(mode is not Memory.STORE for mode in columns.memory)
        for cell in self.calls:
            cell.register_forward_pre_hook(self._begin)
            cell.register_forward_hook(self._end)

    def _begin(self, cell: nn.Module, _: object) -> None:
        if is_replaying():
            return
        self.running = next(self.calls[cast(Cell, cell)])
        is_first = self.running not in self.order
        if is_first:
            self.order.append(self.running)
            self._pass(self.running)  # what was before it
        self.cell = self.running if is_first else None  # the columns run again: all cells hold something by now

    def _end(self, cell: nn.Module, _: object, output: Tensor) -> None:
        if is_replaying():
            return
        index = self.running
        self._pass(self.cell)
        self.cell = None
        if output.requires_grad:
            state = output.nbytes if self.is_taped else 0
            output.register_hook(lambda _: self._backward(index, state))

    def _backward(self, index: int | None, state: int = 0) -> None:
        """The gradient of a cell's state is there: backward comes to the cell.

        Args:
            state: bytes of its state, of which a tape lets go just now; without a tape it is gone already.
        """
        self._pass(self.cell)
        live = self.tracker.live - state
        if self.cell is not None:
            self.kept[self.cell] += self.live - live
        self.cell, self.live = index, live

    def _pass(self, index: int | None) -> None:
        """Attribute what happened since the last event to a cell, or to what lies behind all of them."""
        peak = self.tracker.snapshot("").peak
        if index is None:
            self.behind = max(self.behind, peak)
        else:
            self.peaks[index] = max(self.peaks[index], peak)
            self.work[index] += self.counter.work - self.seen_work
        self.seen_work = self.counter.work

    def end(self) -> CellUses:
        """The backward is over."""
        self._backward(None)
        peaks = (*(self.peaks[index] for index in self.order), self.behind)
        kept, work = (tuple(found[index] for index in self.order) for found in (self.kept, self.work))
        return CellUses(tuple(self.order), kept, work, peaks)
