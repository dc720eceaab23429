"""Partition of a sequence of cells into pipeline stages. The most expensive stage limits the throughput."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from revnets.engine.errors import ArgumentError
from revnets.engine.executor import PlainPass

if TYPE_CHECKING:
    from revnets.engine.columns import ReversibleColumns

BALANCES = ("bytes", "flops", "cells")
"""Costs of a cell by name: bytes of its weights, FLOPs of its forward pass, or 1."""


def partition(costs: Sequence[float], stages: int) -> list[range]:
    """Return contiguous ranges of cells, one per stage, that minimize the largest cost of a stage.

    Ties are broken by the sum of squares, which balances the other stages as well.

    Args:
        costs: Cost of each cell.
        stages: Number of stages.

    Raises:
        ArgumentError: If there are fewer cells than stages, or no stage.
    """
    total = len(costs)
    if not 1 <= stages <= total:
        text = f"{stages} stages: give 1 to {total}, because each stage needs at least one of the {total} cells"
        raise ArgumentError(text, "stages", code="out-of-range")
    sums = [0.0, *accumulate(map(float, costs))]
    infinite = (float("inf"), float("inf"))
    best = [(0.0, 0.0), *[infinite] * total]  # largest cost and sum of squares for each number of first cells
    cuts: list[list[int]] = []
    for stage in range(1, stages + 1):
        found, starts = [infinite] * (total + 1), [0] * (total + 1)
        for end in range(stage, total + 1):
            for start in range(stage - 1, end):
                cost = sums[end] - sums[start]
                largest, squares = best[start]
                found[end], starts[end] = min(
                    (found[end], starts[end]), ((max(largest, cost), squares + cost**2), start)
                )
        best = found
        cuts.append(starts)
    edges = [total]
    for starts in reversed(cuts):
        edges.append(starts[edges[-1]])
    return [range(start, end) for start, end in pairwise(reversed(edges))]


def cell_costs(
    columns: ReversibleColumns,
    balance: str | Sequence[float],
    x: Tensor | None = None,
    stem: nn.Module | None = None,
    head: nn.Module | None = None,
) -> list[float]:
    """Return the cost of each cell. The first cell includes the stem, the last one the head.

    Args:
        columns: Columns of the cells.
        balance: One of `BALANCES`, or the costs themselves.
        x: Input of the stem, or of the columns if there is no stem; required by `flops`. Its values do not matter.
        stem: Runs before the first cell.
        head: Runs after the last cell.

    Raises:
        ArgumentError: `balance` is unknown, the number of costs is not that of the cells, or `x` is missing.
    """
    cells = columns.flat()
    if not isinstance(balance, str):
        costs = [float(cost) for cost in balance]
        if len(costs) != len(cells) or not all(0 <= cost < float("inf") for cost in costs):
            text = f"{len(costs)} costs for {len(cells)} cells; give one finite number per cell, 0 or more"
            raise ArgumentError(text, "balance", code="wrong-length")
        return costs
    if balance not in BALANCES:
        text = f"balance {balance!r}: choose {', '.join(BALANCES)}, or give one cost per cell"
        raise ArgumentError(text, "balance", code="unknown-choice")
    if balance == "cells":
        return [1.0] * len(cells)
    if balance == "flops":
        if x is None:
            text = "balance 'flops' counts the FLOPs of a forward pass and needs an input; give x"
            raise ArgumentError(text, "x", code="missing-key")
        return _flops(columns, x, stem, head)
    costs = [_bytes(cell) for cell in cells]
    costs[0] += _bytes(stem)
    costs[-1] += _bytes(head)
    return costs


def _bytes(module: nn.Module | None) -> float:
    return 0.0 if module is None else float(sum(parameter.nbytes for parameter in module.parameters()))


def _flops(columns: ReversibleColumns, x: Tensor, stem: nn.Module | None, head: nn.Module | None) -> list[float]:
    """Count FLOPs on fake tensors, without computing. Operations that PyTorch does not count cost nothing."""
    modules = [module for part in (columns, stem, head) if part is not None for module in part.modules()]
    training = [module.training for module in modules]
    costs: list[float] = []
    with ExitStack() as stack:
        for module in modules:
            module.training = False  # update no statistics, draw no random numbers
        stack.callback(_set_training, modules, training)
        fake = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(torch.no_grad())
        counter = stack.enter_context(FlopCounterMode(display=False))
        x = fake.from_tensor(x)
        run = PlainPass(columns.graph, columns.flat(), x if stem is None else stem(x))
        for node in columns.graph.nodes:
            run.step(node, run.context)
            costs.append(counter.get_total_flops() - sum(costs))
        if head is not None:
            head(run.results()[0])
        costs[-1] += counter.get_total_flops() - sum(costs)
    return costs


def _set_training(modules: Sequence[nn.Module], training: Sequence[bool]) -> None:
    for module, flag in zip(modules, training, strict=True):
        module.training = flag
