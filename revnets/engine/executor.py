"""Runs a sequence of cells forward, with or without a tape, and backward by the plain inverse."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revnets.engine.coupling import PlainCoupling, subtract
from revnets.engine.errors import ArgumentError
from revnets.engine.graph import STEM, Graph, Node
from revnets.engine.memory_mode import Memory
from revnets.engine.replay.threads import is_inside
from revnets.engine.tape import Tape
from revnets.engine.torch_internals import is_transformed, tree_leaves, without_dynamo


def run(
    graph: Graph,
    cells: Sequence[nn.Module],
    stem: Tensor,
    modes: Sequence[Memory],
    context: Mapping[str, Any],
    taps: Sequence[int] = (),
    stored: Collection[int] = (),
    verify: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run all cells; returns the states `graph.last` and those at the indices `taps`.

    Without a gradient to record, and where autograd's hooks do not reach (export, `torch.func`), there is no tape.

    Args:
        graph: nodes in order, one a cell.
        cells: modules with the signature of `revnets.engine.cell.Cell.forward`.
        stem: what `STEM` reads stand for.
        modes: memory mode of each column.
        context: keyword arguments for every cell, such as a padding mask.
        stored: indices of cells that run in `store`, whatever the mode of their column.
        verify: compare what backward rebuilds with checksums (`revnets/engine/replay/checksums.py`).
    """
    modes = [Memory.STORE if node.index in stored else modes[node.column] for node in graph.nodes]
    if not torch.is_grad_enabled() or all(mode is Memory.STORE for mode in modes) or is_transformed():
        return _run_plain(graph, cells, stem, context, taps)
    return _run_taped(graph, cells, stem, modes, context, taps, verify)


def _run_plain(
    graph: Graph, cells: Sequence[nn.Module], stem: Tensor, context: Mapping[str, Any], taps: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    states: dict[int, Tensor] = {}
    tapped: dict[int, Tensor] = {}
    for node in graph.nodes:
        past = None if node.residual is None else states[node.residual]
        couple = None if past is None else PlainCoupling(graph.name(node.index), past)
        reads = [stem if read == STEM else states[read] for read in node.reads]
        state = cells[node.index](*reads, couple=couple, **context)
        _advance(states, tapped, node, state, taps)
        states.pop(node.index - graph.window, None)
    return [states[index] for index in graph.last], [tapped[index] for index in taps]


@without_dynamo  # the tape is plain Python; to compile the cells, call compile() of the columns
def _run_taped(
    graph: Graph,
    cells: Sequence[nn.Module],
    stem: Tensor,
    modes: Sequence[Memory],
    context: Mapping[str, Any],
    taps: Sequence[int],
    verify: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    if is_inside():
        return _run_plain(graph, cells, stem, context, taps)
    if stem.is_inference():
        raise ArgumentError(
            "the input was made under torch.inference_mode(), so no gradient can be taken through what reads it; "
            "clone() it, or make it under torch.no_grad()",
            "x",
            code="invalid-value",
        )
    tape = Tape(graph, cells, stem, context, verify)
    states: dict[int, Tensor] = {}
    tapped: dict[int, Tensor] = {}
    started = False  # has anything so far needed a gradient?
    for node in graph.nodes:
        past = None if node.residual is None else states[node.residual]
        reads = [stem if read == STEM else states[read] for read in node.reads]
        started = started or _needs_grad(cells[node.index], reads, context)
        if started:
            state = tape.record(node, reads, past, modes[node.index], context)
        else:
            couple = None if past is None else PlainCoupling(graph.name(node.index), past)
            state = cells[node.index](*reads, couple=couple, **context)
            tape.skip()
        _advance(states, tapped, node, state, taps)
    tape.close(states)  # a state that none has replaced stays there, for none gives it back
    return [states[index] for index in graph.last], [tapped[index] for index in taps]


def _advance(
    states: dict[int, Tensor], tapped: dict[int, Tensor], node: Node, state: Tensor, taps: Sequence[int]
) -> None:
    """x_t takes the place of its residual."""
    states[node.index] = state
    if node.residual is not None:
        states.pop(node.residual, None)
    if node.index in taps:
        tapped[node.index] = state


def invert(
    graph: Graph, cells: Sequence[nn.Module], last: Sequence[Tensor], stem: Tensor, context: Mapping[str, Any]
) -> list[list[Tensor]]:
    """All states from those that are left at the end, column by column, last column first. No gradients."""
    states = dict(zip(graph.last, last, strict=True))
    with torch.no_grad():
        for node in reversed(graph.nodes):
            if node.residual is None:
                continue
            reads = [stem if read == STEM else states[read] for read in node.reads]
            states[node.residual] = cells[node.index](*reads, couple=partial(subtract, states[node.index]), **context)
    columns: list[list[Tensor]] = [[] for _ in range(graph.columns)]
    for node in graph.nodes:
        columns[node.column].append(states[node.index])
    return columns[::-1]


def _needs_grad(cell: nn.Module, reads: list[Tensor], context: Mapping[str, Any]) -> bool:
    return (
        any(read.requires_grad for read in reads)
        or any(parameter.requires_grad for parameter in cell.parameters())
        or any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(dict(context)))
    )
