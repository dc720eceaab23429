"""What the forward of each column adds to the bytes alive."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from revnets.engine.cell import Cell
from revnets.engine.columns_group import ColumnsGroup
from revnets.memory.tracker import MemoryTracker


@contextmanager
def bytes_by_column(group: ColumnsGroup, tracker: MemoryTracker) -> Iterator[dict[int, int]]:
    """Fill a dict with what each column's forward adds to the bytes alive, from its first cell to the next one's.

    The last column of a sequence ends with the forward of the sequence. If a model calls the blocks one by one, that
    forward never runs: the column then ends with its last cell, less the bytes of its sequence that are freed before
    the next sequence starts, or before the model's forward ends.

    Args:
        group: its columns are the keys, in the order in which they run.
        tracker: is active inside of the context.
    """
    spans = _Spans(group, tracker)
    cells = dict.fromkeys(group.flat())  # a set: one cell may serve several columns
    handles = [cell.register_forward_pre_hook(spans.enter_cell) for cell in cells]
    handles += [cell.register_forward_hook(spans.leave_cell) for cell in cells]
    handles += [columns.register_forward_hook(spans.leave_sequence) for columns in group]
    try:
        yield spans.added
        spans.finish()
    finally:
        for handle in handles:
            handle.remove()


class _Spans:
    """The columns of the sequence that runs, from mark to mark."""

    def __init__(self, group: ColumnsGroup, tracker: MemoryTracker):
        self.tracker = tracker
        self.added: dict[int, int] = {}
        self.starts: dict[int, int] = {}  # bytes alive as each column of the running sequence begins
        self.outside = 0  # bytes alive at the end of the last cell so far that were made outside of all cells
        self.indices = group.call_indices()
        self.first_columns = group.first_columns
        self.columns = group.column_of_cell

    def enter_cell(self, cell: nn.Module, *_: Any) -> None:
        index = next(self.indices[cast(Cell, cell)])
        column = self.columns[index]
        if index == 0 or self.columns[index - 1] != column:
            if column in self.first_columns:
                self.finish()
            self.starts[column] = self.tracker.live
        self.tracker.label = column

    def leave_cell(self, *_: Any) -> None:
        self.tracker.label = None
        self.outside = self.tracker.live_by_label[None]

    def leave_sequence(self, *_: Any) -> None:
        self._close(self.tracker.live)

    def finish(self) -> None:
        """End the running sequence, if its own forward has not."""
        self._close(self.tracker.live - self.tracker.live_by_label[None] + self.outside)

    def _close(self, end: int) -> None:
        """Weights that autocast has cast live in its cache until the region ends; no column keeps them."""
        if not self.starts:
            return
        before = self.tracker.live_by_label.copy()
        torch.clear_autocast_cache()
        cached = before - self.tracker.live_by_label
        ends = [*list(self.starts.values())[1:], end]
        for (column, start), stop in zip(self.starts.items(), ends, strict=True):
            self.added[column] = self.added.get(column, 0) + stop - start - cached[column]
        self.starts.clear()
