"""Record of how the memory and the compute of one training step divide among the cells of a model."""

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
    """What the cells of a model keep, and the peak around each of them, in the order of the forward pass.

    Entry k of `peaks` covers the forward pass from the end of cell k - 1 to the end of cell k, and the backward pass
    of cell k. During both, cells 0 to k - 1 hold what they keep, and later cells hold nothing.

    Attributes:
        indices: Indices of the cells (`ColumnsGroup.stored`).
        kept: Bytes that the backward pass of each cell frees, minus those of the gradients that it allocates.
        work: Compute cost of forward, backward and replay of each cell, in units of `OpCounter.work`.
        peaks: Most bytes alive at once around each cell. The last entry is for everything between the forward and the
            backward pass of the last cell, such as the head and the loss.
    """

    indices: tuple[int, ...]
    kept: tuple[int, ...]
    work: tuple[int, ...]
    peaks: tuple[int, ...]


class StepRecord:
    """Records one forward and backward pass of a model.

    Args:
        model: Model with or without reversible columns. Its cells get hooks that are not removed, so pass a copy.
        tracker: Active tracker of the step.
        counter: Active operator counter of the step.
    """

    def __init__(self, model: nn.Module, tracker: MemoryTracker, counter: OpCounter):
        self.tracker, self.counter = tracker, counter
        self.order: list[int] = []
        self.kept: Counter[int] = Counter()
        self.work: Counter[int] = Counter()
        self.peaks: Counter[int] = Counter()
        self.behind = 0  # peak between forward and backward of the last cell
        self.running = 0  # index of the cell that was called last
        self.cell: int | None = None  # cell to which everything since the last event is attributed, if any
        self.live = 0  # bytes alive at the last event of backward
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
            self._pass(self.running)  # what ran before it
        self.cell = self.running if is_first else None  # in a second run of the columns, all cells hold tensors

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
        """Record that the gradient of a cell's state exists, which begins the backward pass of the cell.

        Args:
            index: Index of the cell, or None after the last one.
            state: Bytes of its state, which a tape frees right after this call. 0 without a tape.
        """
        self._pass(self.cell)
        live = self.tracker.live - state
        if self.cell is not None:
            self.kept[self.cell] += self.live - live
        self.cell, self.live = index, live

    def _pass(self, index: int | None) -> None:
        """Attribute what happened since the last event to a cell, or to the part after the last cell."""
        peak = self.tracker.snapshot("").peak
        if index is None:
            self.behind = max(self.behind, peak)
        else:
            self.peaks[index] = max(self.peaks[index], peak)
            self.work[index] += self.counter.work - self.seen_work
        self.seen_work = self.counter.work

    def end(self) -> CellUses:
        """Finish the record after backward and return it."""
        self._backward(None)
        peaks = (*(self.peaks[index] for index in self.order), self.behind)
        kept, work = (tuple(found[index] for index in self.order) for found in (self.kept, self.work))
        return CellUses(tuple(self.order), kept, work, peaks)
