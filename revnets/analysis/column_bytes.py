"""Bytes that the forward pass of each column adds to those alive."""

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
    """Measure the bytes that each column adds, from its first cell to the first cell of the next column.

    The last column of a sequence ends with the forward pass of the sequence. If a model calls the blocks one by one,
    that forward pass never runs. The column then ends with its last cell. Bytes of its sequence that are freed before
    the next sequence starts, or before the forward pass of the model ends, are subtracted.

    Args:
        group: Columns of the model.
        tracker: Tracker that is active inside the context.

    Yields:
        A dict that is filled with the bytes of each column, in the order in which the columns run.
    """
    spans = _Spans(group, tracker)
    cells = dict.fromkeys(group.flat())  # a set, because several columns may share a cell
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
    """Bytes alive at the boundaries of the columns of the running sequence."""

    def __init__(self, group: ColumnsGroup, tracker: MemoryTracker):
        self.tracker = tracker
        self.added: dict[int, int] = {}
        self.starts: dict[int, int] = {}  # bytes alive when each column of the running sequence starts
        self.outside = 0  # bytes alive after the last cell so far that were allocated outside of all cells
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
        """End the running sequence unless its forward pass has ended it."""
        self._close(self.tracker.live - self.tracker.live_by_label[None] + self.outside)

    def _close(self, end: int) -> None:
        """Compute the bytes of the columns of the running sequence, which ends with `end` bytes alive."""
        if not self.starts:
            return
        # Weights that autocast has cast stay in its cache until the region ends. They belong to no column.
        before = self.tracker.live_by_label.copy()
        torch.clear_autocast_cache()
        cached = before - self.tracker.live_by_label
        ends = [*list(self.starts.values())[1:], end]
        for (column, start), stop in zip(self.starts.items(), ends, strict=True):
            self.added[column] = self.added.get(column, 0) + stop - start - cached[column]
        self.starts.clear()
