"""Which cells to store first: those that spare the most work for the bytes by which they raise the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from revnets.engine.cell import Cell
from revnets.engine.columns_group import find_columns
from revnets.engine.memory_mode import Memory
from revnets.memory.simulation import fake, total
from revnets.memory.tracker import MemoryTracker, OpCounter


@dataclass(frozen=True, slots=True)
class Cost:
    """What it takes to store a cell, and what it spares."""

    kept: int  # bytes that its forward leaves behind under plain autograd
    flops: int  # of its forward, which need not be run again
    gradients: int  # bytes of the gradients of its parameters


def order(costs: Sequence[Cost]) -> list[int]:
    """The cells in the order in which storing them pays, as there is more and more room.

    Backward comes to the last cell first. At cell u the memory holds what stored cells before u keep, the gradients of
    the cells behind u, and what u itself needs, stored or replayed. So what a cell keeps is in the way of all cells
    behind it, and of none before; and the nearer to the end, the more room do gradients leave that are yet to come.
    First come, greedily, cells that do not raise the peak of all this, most work for a byte first; then the one that
    spares the most work for a byte of higher peak, then those that do not raise the new peak, and so on.

    Args:
        costs: of each cell, in the order of the forward.
    """
    count = len(costs)
    held, behind = [0.0] * count, 0  # when backward is at each cell
    for u in reversed(range(count)):
        held[u] = WORKING * costs[u].kept + behind
        behind += costs[u].gradients
    left, found = set(range(count)), []
    while left:
        highest = list(accumulate(reversed([*held[1:], 0.0]), max))[::-1]  # of the cells behind each
        peak = max(held)

        def worth(t: int, highest: list[float] = highest, peak: float = peak) -> tuple[bool, float, int]:
            growth = highest[t] + costs[t].kept - peak if t < count - 1 else 0.0
            free = growth <= 0
            return free, costs[t].flops / max(costs[t].kept if free else growth, 1), t

        best = max(left, key=worth)
        left.remove(best)
        found.append(best)
        for u in range(best + 1, count):
            held[u] += costs[best].kept
    return found


WORKING = 1.5
"""What the backward of a cell needs, in terms of what its forward keeps: gradients of activations come on top."""


def costs_of_cells(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> dict[int, Cost]:
    """What each cell of a model would cost, found on fake copies of the model and its inputs.

    Returns:
        The cost by the index of the cell (`ColumnsGroup.stored`), in the order of the forward.
    """
    found: dict[int, Cost] = {}
    with FakeTensorMode() as mode:
        model, inputs = fake((model, inputs), mode)
        columns = find_columns(model)
        columns.memory = Memory.STORE
        indices = columns.call_indices()
        with MemoryTracker() as tracker, OpCounter() as counter:
            before: list[tuple[int, int]] = []

            def begin(*_: Any) -> None:
                before.append((tracker.live, counter.flops))

            def end(cell: nn.Module, *_: Any) -> None:
                live, flops = before.pop()
                index = next(indices[cast(Cell, cell)])
                known = found.get(index, Cost(0, 0, 0))  # of an earlier call, if the model runs its columns again
                kept, work = known.kept + tracker.live - live, known.flops + counter.flops - flops
                found[index] = Cost(kept, work, _gradients(cell))

            for cell in indices:
                cell.register_forward_pre_hook(begin)
                cell.register_forward_hook(end)
            tracker.register(model)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                outputs: Tensor = total(model(*inputs))
            del outputs
    return found


def _gradients(cell: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in cell.parameters() if parameter.requires_grad)
