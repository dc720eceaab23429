"""Reconstruction of the states of every column by the tape that backward uses."""

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
"""Keyword arguments of each cell, by cell index."""


def reconstruction(columns: ReversibleColumns, call: Callable[[], Any], seed: int) -> tuple[ColumnAudit, ...]:
    """Compare the states that backward rebuilds with those of the forward pass, column by column.

    Backward starts from the last window of states, which is not rebuilt and not part of the result.

    Args:
        columns: Columns whose states are rebuilt.
        call: Runs the model with these columns. After the cells have run, their states are rebuilt from the same
            input, with the same arguments of each cell and the same autocast state.
        seed: Seed of the random numbers in the cells.

    Returns:
        The reconstruction of each column, or nothing if a cell cannot be taped.
    """
    found: list[tuple[ColumnAudit, ...]] = []
    stems: list[Tensor] = []
    contexts: Contexts = {}  # by cell index, because the arguments of rewired blocks may differ
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
            handle.remove()  # the comparison also calls the cells
        found.append(_compare(columns, stems[0], contexts, seed))

    handles = [cell.register_forward_pre_hook(enter, with_kwargs=True) for cell in indices]
    handles += [cell.register_forward_hook(leave) for cell in indices]
    handles.append(columns.register_forward_hook(finish))  # the model may skip some cells
    try:
        with torch.no_grad():
            call()
    except ReplayError:
        return ()  # a cell that cannot be taped; the audit reports its error in every mode but `store`
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
    """Run all cells on a tape, rebuild the states from the last ones as backward does, and compare them."""
    graph, cells = columns.graph, columns.flat()
    common = contexts[0]  # also for cells that the model has skipped
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
            tape.move_to(node.index - 1)  # undoes the cell that replaced x_t, which rebuilds x_t
            result[t] = distance(tape.window[t].tensor, states[t])
    return result


@contextmanager
def observed(columns: ReversibleColumns, note: Callable[[int, Tensor], None]) -> Generator[None]:
    """Context manager that calls `note(t, x_t)` after each cell t has run.

    The state includes its autograd graph, if there is one. It stays alive only if `note` keeps a reference. Leave the
    context before `backward`, whose replays also call cells.

    Args:
        columns: Columns that run once inside the context.
        note: Called with the index of the cell and its state. It must not change the state.
    """
    index = count()

    def hook(_module: nn.Module, _inputs: Any, state: Tensor) -> None:
        note(next(index), state)

    cells = dict.fromkeys(columns.flat())  # a set, because several columns may share a cell
    handles = [cell.register_forward_hook(hook) for cell in cells]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
