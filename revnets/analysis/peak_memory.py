"""Breakdown of the peak memory of a training step: what the bytes alive at the peak belong to.

The step runs twice on fake tensors, as for `revnets.plan`. The first pass finds the peak. The second pass stops at the
same allocation and sorts every live storage by its holder (parameter, gradient, optimizer, tape), or by the part of
the step that allocated it if it has no such holder. The parts add up to the peak.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from revnets.analysis.peak_report import PARTS, MemoryParts, PeakMemory
from revnets.config.memory_budget import OPTIMIZERS
from revnets.engine import lost_bits
from revnets.engine.cell import Cell
from revnets.engine.columns_group import ColumnsGroup, find_columns
from revnets.engine.executor import modes_of_cells
from revnets.engine.memory_mode import Memory
from revnets.engine.tape import Tape
from revnets.memory.simulation import fake, total, typical_gamma, without_packing
from revnets.memory.tracker import MemoryTracker, tensors


def memory_parts(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    modes: tuple[str, ...] = tuple(Memory),
    progress: Callable[[str], None] | None = None,
) -> MemoryParts:
    """Break down the peak of a training step in each memory mode.

    The loss is the cross entropy if the model returns logits (a matrix, or a mapping with `logits` as models of
    transformers return), otherwise the mean of all outputs.

    Args:
        model: Module with reversible columns, see `revnets.find_columns`. It may be on the meta device.
        inputs: Positional arguments of its forward pass. Only shapes and dtypes matter.
        dtype: float32, or bfloat16 or float16 for autocast.
        optimizer: Optimizer whose state is counted, a key of `revnets.config.memory_budget.OPTIMIZERS`.
        modes: Memory modes.
        progress: Called with each mode before it is simulated.

    Returns:
        The parts of the peak in each mode.

    Raises:
        ArgumentError: If there are no reversible columns, or no output requires a gradient.
        RuntimeError: If the model runs different operations at every call.
    """
    columns = find_columns(model)
    shape = next((tuple(value.shape) for value in inputs if isinstance(value, Tensor)), ())
    found = []
    for mode in modes:
        if progress is not None:
            progress(mode)
        with columns.using(modes=mode, stored=0):
            found.append(_peak(model, inputs, dtype, OPTIMIZERS[optimizer], mode))
    levels = max(member.graph.m for member in columns)
    return MemoryParts(type(model).__name__, shape, str(dtype).removeprefix("torch."), optimizer, levels, tuple(found))


def _peak(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype, states: int, mode: str) -> PeakMemory:
    step = _Step(model, inputs, dtype, states)
    step.run()
    most = step.tracker.most_of_cells
    for _ in range(PASSES):
        step = _Step(model, inputs, dtype, states, stop=step.tracker.peak_at, calls=step.place.seen)
        step.run()
        if step.found is not None and sum(step.found.parts.values()) == step.tracker.peak:
            cell = max(most, key=most.__getitem__)
            return PeakMemory(mode, *step.found, step.cell_name(cell), most[cell])
    name = type(model).__name__
    raise RuntimeError(f"{name} runs different operations at every call, so its peak differs. Make all calls equal")


PASSES = 3
"""Largest number of passes that search for the peak again. Tensors that a model caches exist only after the first."""


class _Found(NamedTuple):
    """The breakdown of the bytes alive at the peak."""

    parts: dict[str, int]
    place: str
    is_backward: bool


class _Label(NamedTuple):
    """The part of the step in which a storage is allocated."""

    is_backward: bool
    cell: int | None  # index of the running cell, None between cells
    seen: int  # number of cells that have finished their forward pass


class _PeakTracker(MemoryTracker):
    """A tracker that records at which count the peak occurs, and calls `look` at the count `stop`.

    Attributes:
        most_of_cells: By cell index, the most bytes alive at once that the cell has allocated in its forward pass, or
            in its replay and backward pass.
    """

    def __init__(self, stop: int | None, look: Callable[[], None]):
        super().__init__()
        self.counts = self.peak_at = 0
        self.most_of_cells: Counter[int] = Counter()
        self.stop, self.look = stop, look

    def _count(self, storage: torch.UntypedStorage) -> None:
        before = self.peak
        super()._count(storage)
        self.counts += 1
        if self.peak > before:
            self.peak_at = self.counts
        if isinstance(self.label, _Label) and self.label.cell is not None:
            cell, alive = self.label.cell, self.live_by_label[self.label]
            self.most_of_cells[cell] = max(self.most_of_cells[cell], alive)
        if self.counts == self.stop:
            self.look()


class _Step:
    """One training step of a fake copy of the model.

    Args:
        model: The model.
        inputs: Positional arguments of its forward pass.
        dtype: float32, or the autocast dtype.
        states: Tensors of a weight's size in the optimizer state.
        stop: Count of the tracker at which live storages are sorted.
        calls: Calls of cells in a forward pass, for a pass with `stop`.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Any, ...],
        dtype: torch.dtype,
        states: int,
        stop: int | None = None,
        calls: int = 0,
    ):
        self.original, self.inputs, self.dtype, self.states, self.calls = model, inputs, dtype, states, calls
        self.tracker = _PeakTracker(stop, self._look)
        self.place = _Label(False, None, 0)
        self.found: _Found | None = None

    def run(self) -> None:
        tracker, gamma = self.tracker, typical_gamma(self.original)
        with FakeTensorMode() as mode, lost_bits.assumed(gamma):
            self.model, self.given = fake((self.original, self.inputs), mode)
            self.columns = find_columns(self.model)
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            with without_packing((self.given, vars(self.model))), tracker:
                tracker.label = "weights"
                tracker.register(self.model)
                tracker.label = "input"
                tracker.register(self.given)
                tracker.label = "optimizer"
                held = [torch.empty_like(parameter) for parameter in trained for _ in range(self.states)]
                self._move(False, None)
                with self._followed():
                    with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
                        loss = training_loss(self.model(*self.given))
                    self._move(True, None)
                    loss.backward()
        del held

    def _move(self, is_backward: bool, cell: int | None, passed: int = 0) -> None:
        self.place = self.tracker.label = _Label(is_backward, cell, self.place.seen + passed)

    @contextmanager
    def _followed(self) -> Iterator[None]:
        """Update `place` by hooks: on cells in forward and in replays, and on their states in backward."""
        columns = self.columns
        calls = columns.call_indices()
        indices: dict[Cell, int] = {}
        firsts = {column: True for column in columns.first_columns}
        column_of_cell = columns.column_of_cell

        def reached(index: int | None, gradient: Tensor) -> None:
            self._move(True, index)

        def enter(cell: nn.Module, reads: tuple[Any, ...]) -> None:
            if self.place.is_backward:
                self._move(True, indices.get(cast(Cell, cell)))
                return
            index = indices[cast(Cell, cell)] = next(calls[cast(Cell, cell)])
            if firsts.pop(column_of_cell[index], False):  # after these cells, backward reaches what precedes them
                for read in tensors(reads):
                    if read.requires_grad:
                        read.register_hook(lambda gradient: reached(None, gradient))
            self._move(False, index)

        def leave(cell: nn.Module, reads: tuple[Any, ...], state: Any) -> None:
            if self.place.is_backward:
                return
            index = indices[cast(Cell, cell)]
            for tensor in tensors(state):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: reached(index, gradient))
            self._move(False, None, passed=1)

        cells = dict.fromkeys(columns.flat())
        handles = [cell.register_forward_pre_hook(enter) for cell in cells]
        handles += [cell.register_forward_hook(leave) for cell in cells]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _look(self) -> None:
        """Sort the live bytes by part. Tensors that a replay saves belong to the running cell."""
        tracker, place = self.tracker, self.place
        for tape in [item for item in gc.get_objects() if type(item) is Tape]:  # no registry contains all tapes
            for part, held in _holdings(tape):
                tracker.relabel(part, held)
        tracker.relabel("weights", list(self.model.parameters()), list(self.model.buffers()))
        tracker.relabel("gradients", [parameter.grad for parameter in self.model.parameters()])
        tracker.relabel("input", self.given)
        alive = tracker.live_by_label.copy()
        torch.clear_autocast_cache()
        cached = alive - tracker.live_by_label
        parts: Counter[str] = Counter({"cast weights": cached.total()})
        sort = self._sorter()
        for label, count in (alive - cached).items():
            parts[label if isinstance(label, str) else sort(cast(_Label, label))] += count
        shown = {part: parts[part] for part in PARTS if parts[part]}
        self.found = _Found(shown, self._name(place), place.is_backward)

    def _sorter(self) -> Callable[[_Label], str]:
        stored = _stored_cells(self.columns)
        place = self.place

        def sort(label: _Label) -> str:
            if label.cell is None:
                if label.is_backward and place.cell is not None:
                    return "window"  # gradients of states that wait for their cells
                return "head and loss" if label.seen >= self.calls else "stem"
            if label == place or (label.is_backward and label.cell == place.cell):
                return "running cell"
            if not label.is_backward and label.cell in stored:
                return "stored cells"
            return "window"

        return sort

    def _name(self, place: _Label) -> str:
        if place.cell is not None:
            return self.cell_name(place.cell)
        return "head and loss" if place.seen >= self.calls else "stem"

    def cell_name(self, index: int) -> str:
        """Return the name of a cell (see `Graph.name`), with the index of its sequence if there are several."""
        start = 0
        for number, member in enumerate(self.columns):
            if index < start + len(member.graph.nodes):
                name = member.graph.name(index - start)
                return f"cell {name}" if len(self.columns) == 1 else f"cell {name} of sequence {number}"
            start += len(member.graph.nodes)
        raise AssertionError(f"no cell {index}")


def training_loss(output: Any) -> Tensor:
    """Return the cross entropy of logits, or the mean of all outputs if there are none. See `memory_parts`."""
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if isinstance(logits, Tensor) and logits.requires_grad and logits.dim() in (2, 3) and logits.is_floating_point():
        is_text = isinstance(output, Mapping)
        if logits.dim() == 2 or is_text:
            rows = logits.flatten(0, -2)
            return F.cross_entropy(rows, torch.zeros(len(rows), dtype=torch.long, device=rows.device))
    return total(output)


def _stored_cells(columns: ColumnsGroup) -> frozenset[int]:
    found, start = set(), 0
    for member in columns:
        modes = modes_of_cells(member.graph, member.memory, member.stored)
        found |= {start + index for index, mode in enumerate(modes) if mode is Memory.STORE}
        start += len(modes)
    return frozenset(found)


def _holdings(tape: Tape) -> Iterator[tuple[str, list[Any]]]:
    """Yield what a tape holds by part. Later parts have precedence: a replay also saves states of the window."""
    records = [record for record in tape.records if record is not None]
    yield "running cell", [held.tensor for record in records for held in record.saved.values()]
    yield "kept states", [record.kept.tensor for record in records if record.kept is not None]
    for record in records:
        if record.lost is not None:
            yield "lost bits", [getattr(record.lost, field.name) for field in fields(record.lost)]
    yield "window", [held.tensor for held in (*tape.window.values(), *tape.last.values())]
