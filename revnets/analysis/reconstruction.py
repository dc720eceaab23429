"""How well the states of every column come back, through the tape that backward uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from revnets.analysis.audit_report import ColumnAudit
from revnets.analysis.gradient_distance import Distance, distance, ratio
from revnets.engine.cell import Cell
from revnets.engine.columns import ReversibleColumns
from revnets.engine.columns_group import ColumnsGroup
from revnets.engine.errors import ReplayError
from revnets.engine.graph import STEM
from revnets.engine.memory_mode import Memory
from revnets.engine.tape import Tape

Contexts: TypeAlias = "dict[int, dict[str, Any]]"
"""Keyword arguments of each cell, by its index."""


def reconstruction(columns: ReversibleColumns, call: Callable[[], Any], seed: int) -> tuple[ColumnAudit, ...]:
    """Compare the states that backward rebuilds with those of the forward, column by column.

    The last window of states is where backward starts; it is not rebuilt and not part of the result.

    Args:
        columns: whose states.
        call: runs the model around them. When it has run the cells, their states are rebuilt, on the same input, with
            the same arguments of each cell and under the same autocast.
        seed: for the random numbers inside of the cells.
    """
    found: list[tuple[ColumnAudit, ...]] = []
    stems: list[Tensor] = []
    contexts: Contexts = {}  # by index of the cell: a rewired block has arguments of its own
    indices = ColumnsGroup([columns]).call_indices()

    def enter(cell: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        index = next(indices[cast(Cell, cell)])
        if index == 0:
            stems.append(args[0])
        contexts[index] = {name: value for name, value in kwargs.items() if name != "couple"}

    def leave(*_: Any) -> None:
        if len(contexts) == len(columns.graph.nodes):
            finish()

    def finish(*_: Any) -> None:
        for handle in handles:
            handle.remove()  # the comparison calls the cells as well
        found.append(_compare(columns, stems[0], contexts, seed))

    handles = [cell.register_forward_pre_hook(enter, with_kwargs=True) for cell in indices]
    handles += [cell.register_forward_hook(leave) for cell in indices]
    handles.append(columns.register_forward_hook(finish))  # some cells may be left out
    try:
        with torch.no_grad():
            call()
    except ReplayError:
        return ()  # a cell that cannot be taped: every mode but `store` has failed on it and said why
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ()


def _compare(columns: ReversibleColumns, stem: Tensor, contexts: Contexts, seed: int) -> tuple[ColumnAudit, ...]:
    by_inverse = _rebuilt(columns, stem, contexts, seed, Memory.INVERT)
    by_lost_bits = _rebuilt(columns, stem, contexts, seed, Memory.EXACT)
    result = []
    for column in range(columns.graph.columns):
        indices = [t for t in columns.graph.states_of(column) if t in by_inverse]
        if not indices:
            continue
        levels = [by_inverse[t] for t in indices]
        result.append(
            ColumnAudit(
                column=column,
                elements=tuple(level.elements for level in levels),
                invert_error=ratio(
                    math.hypot(*(level.norm for level in levels)),
                    math.hypot(*(level.reference_norm for level in levels)),
                ),
                invert_max=max(ratio(level.largest, level.reference_largest) for level in levels),
                invert_levels=tuple(level.relative for level in levels),
                exact=all(by_lost_bits[t].equal for t in indices),
            )
        )
    return tuple(result)


def _rebuilt(
    columns: ReversibleColumns, stem: Tensor, contexts: Contexts, seed: int, mode: Memory
) -> dict[int, Distance]:
    """Run all cells on a tape, keep every state beside it, let it come down as backward does, and compare."""
    graph, cells = columns.graph, columns.flat()
    common = contexts[0]  # of cells that the model has left out as well
    tape = Tape(graph, cells, stem, common)
    states: list[Tensor] = []
    torch.manual_seed(seed)
    with torch.enable_grad():
        for node in graph.nodes:
            reads = [stem if read == STEM else states[read] for read in node.reads]
            past = None if node.residual is None else states[node.residual]
            context = contexts.get(node.index, common)
            is_common = context.keys() == common.keys() and all(context[name] is common[name] for name in common)
            states.append(tape.record(node, reads, past, mode, context, is_common))
    replaced = graph.replaced
    tape.close({t: state for t, state in enumerate(states) if t not in replaced})
    states = [state.detach() for state in states]
    result = {}
    for node in reversed(graph.nodes):
        if (t := node.residual) is not None:
            tape.move_to(node.index - 1)  # steps below the state that has replaced x_t, and so rebuilds x_t
            result[t] = distance(tape.window[t].tensor, states[t])
    return result


@contextmanager
def observed(columns: ReversibleColumns, note: Callable[[int, Tensor], None]) -> Generator[None]:
    """Call `note(t, x_t)` for each cell t as soon as it has run.

    The state comes with its graph, if there is one. It lives on only as long as `note` keeps it. Leave the context
    before `backward`, whose replays call cells as well.

    Args:
        columns: run once inside of the context.
        note: may not change the state.
    """
    index = count()

    def hook(_module: nn.Module, _inputs: Any, state: Tensor) -> None:
        note(next(index), state)

    cells = dict.fromkeys(columns.flat())  # a set: one cell may serve several columns
    handles = [cell.register_forward_hook(hook) for cell in cells]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
