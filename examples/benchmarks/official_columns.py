"""The memory scheme of the official RevCol code, on the cells of this project, for comparison.

Every column is one autograd function. It saves the output states of its column, so memory grows with the number of
columns. It rebuilds the states of the previous column by plain inversion, level by level, and discards them, so errors
do not propagate between columns. Each level is replayed and differentiated separately.

Source: Cai et al., "Reversible Column Networks", ICLR 2023, and the code released with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import revnets
from revnets.engine.cell import Cell
from revnets.engine.coupling import add
from revnets.engine.graph import STEM, Node


class OfficialColumns(nn.Module):
    """Columns of this project with the backward pass of the official code. Supports `backward`, but not `grad`."""

    def __init__(self, columns: revnets.ReversibleColumns):
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> list[Tensor]:
        graph, states = self.columns.graph, ()
        for column, cells in enumerate(self.columns.cells):
            nodes = graph.nodes[column * graph.m : (column + 1) * graph.m]
            states = _Column.apply(nodes, list(cells), x, *states)
        return list(states)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, nodes: Sequence[Node], cells: Sequence[Cell], x: Tensor, *before: Tensor):
        ctx.nodes, ctx.cells = nodes, cells
        kind = x.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        states = {STEM: x, **dict(enumerate(before, nodes[0].index - len(before)))}
        for node, cell in zip(nodes, cells, strict=True):
            past = None if node.residual is None else states[node.residual]
            couple = None if past is None else partial(add, past)
            states[node.index] = cell(*(states[read] for read in node.reads), couple=couple)
        found = tuple(states[node.index] for node in nodes)
        ctx.save_for_backward(x, *found)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        nodes: Sequence[Node] = ctx.nodes
        x, *found = ctx.saved_tensors
        leaves = {STEM: x.detach().requires_grad_()}
        leaves |= {node.index: state.detach().requires_grad_() for node, state in zip(nodes, found, strict=True)}
        coming = dict(zip((node.index for node in nodes), gradients, strict=True))
        kind, dtype, enabled = ctx.autocast
        for node, cell in reversed(list(zip(nodes, ctx.cells, strict=True))):
            state = leaves[node.index]
            gradient = coming[node.index] if state.grad is None else coming[node.index] + state.grad
            with torch.enable_grad(), torch.autocast(kind, dtype, enabled=enabled):
                update = cell.function(*(leaves[read] for read in node.reads))
                output = update
                if node.residual is not None:
                    gain = cell.gamma()
                    with torch.no_grad():
                        past = (state - update) / gain
                    leaves[node.residual] = past.detach().requires_grad_()
                    output = update + gain * leaves[node.residual]
            torch.autograd.backward(output, gradient.to(output.dtype))
        before = [leaves[node.residual].grad for node in nodes if node.residual is not None]
        return None, None, leaves[STEM].grad, *before
