"""Runs a sequence of cells forward, with or without a tape, and inverts it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revnets.engine.coupling import PlainCoupling, subtract
from revnets.engine.errors import ArgumentError
from revnets.engine.graph import STEM, Graph, Node
from revnets.engine.memory_mode import Kept, Memory, Products
from revnets.engine.replay.threads import is_inside
from revnets.engine.tape import Tape
from revnets.engine.torch_internals import is_transformed, tree_leaves, without_dynamo

if TYPE_CHECKING:
    from revnets.engine.budget import Budget

_NONE: Kept = {}
_NO_PRODUCTS: Products = {}


def run(
    graph: Graph,
    cells: Sequence[nn.Module],
    stem: Tensor,
    modes: Sequence[Memory],
    context: Mapping[str, Any],
    taps: Sequence[int] = (),
    stored: Collection[int] = (),
    verify: bool = False,
    kept: Kept = _NONE,
    offloaded: Collection[int] = (),
    products: Products = _NO_PRODUCTS,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run all cells.

    There is no tape if no gradient is recorded or hooks on saved tensors do not work (export, `torch.func`).

    Args:
        graph: Nodes in order, one per cell.
        cells: Modules with the signature of `revnets.engine.cell.Cell.forward`.
        stem: Output of the stem, shape (B, ..., C).
        modes: Memory mode of each column.
        context: Keyword arguments for every cell, such as a padding mask.
        taps: Indices of states to return as intermediate outputs.
        stored: Indices of cells that run in `store`, regardless of the mode of their column.
        verify: Compare what backward rebuilds with checksums (`revnets/engine/replay/checksums.py`).
        kept: Cells that keep their state instead of lost bits, in any mode but `store`.
        offloaded: Indices of cells that hold in host memory what they keep.
        products: Matrix products whose results cells keep, in any mode but `store`.

    Returns:
        The states `graph.last` and the intermediate outputs.
    """
    modes = modes_of_cells(graph, modes, stored, kept)
    if not is_recorded(modes, offloaded):
        return _run_plain(graph, cells, stem, context, taps)
    return _run_taped(graph, cells, stem, modes, context, taps, verify, kept, offloaded, products)


def modes_of_cells(
    graph: Graph, modes: Sequence[Memory], stored: Collection[int], kept: Collection[int] = ()
) -> list[Memory]:
    """Return the memory mode of each cell, from the modes of the columns and the stored and kept cells."""

    def mode(index: int, column: int) -> Memory:
        if index in stored:
            return Memory.STORE
        return Memory.RECOMPUTE if index in kept and modes[column] is not Memory.STORE else modes[column]

    return [mode(node.index, node.column) for node in graph.nodes]


def is_recorded(modes: Sequence[Memory], offloaded: Collection[int] = ()) -> bool:
    """Whether a pass in these modes needs a tape: a gradient is recorded, and hooks on saved tensors work."""
    needs_tape = bool(offloaded) or any(mode is not Memory.STORE for mode in modes)
    return torch.is_grad_enabled() and needs_tape and not is_transformed()


class PlainPass:
    """One pass over the cells without a tape.

    Args:
        graph: As in `run`.
        cells: As in `run`.
        stem: As in `run`.
        taps: As in `run`.

    Attributes:
        context: Keyword arguments that all cells share.
        states: States that later cells still need, by index.
        tapped: Intermediate outputs, by index.
    """

    def __init__(self, graph: Graph, cells: Sequence[nn.Module], stem: Tensor, taps: Sequence[int] = ()):
        self.graph = graph
        self.cells = cells
        self.stem = stem
        self.context: Mapping[str, Any] = {}
        self.taps = taps
        self.states: dict[int, Tensor] = {}
        self.tapped: dict[int, Tensor] = {}

    def step(self, node: Node, context: Mapping[str, Any]) -> Tensor:
        """Run the next cell and return its state, which replaces its residual."""
        state = self._call(node, self._reads(node), self._past(node), context)
        self._advance(node, state)
        self.states.pop(node.index - self.graph.window, None)
        return state

    def _call(self, node: Node, reads: list[Tensor], past: Tensor | None, context: Mapping[str, Any]) -> Tensor:
        couple = None if past is None else PlainCoupling(self.graph.name(node.index), past)
        return self.cells[node.index](*reads, couple=couple, **context)

    def _reads(self, node: Node) -> list[Tensor]:
        return [self.stem if read == STEM else self.states[read] for read in node.reads]

    def _past(self, node: Node) -> Tensor | None:
        return None if node.residual is None else self.states[node.residual]

    def _advance(self, node: Node, state: Tensor) -> None:
        self.states[node.index] = state
        if node.residual is not None:
            self.states.pop(node.residual, None)
        if node.index in self.taps:
            self.tapped[node.index] = state

    def close(self) -> None:
        """Prepare backward from the current states. More cells may follow, and then another call of this method.

        Does nothing without a tape.
        """

    def results(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the states `graph.last` and the intermediate outputs."""
        return [self.states[index] for index in self.graph.last], [self.tapped[index] for index in self.taps]


class TapedPass(PlainPass):
    """One pass recorded on a tape, starting at the first cell that needs a gradient.

    Args:
        graph: As in `run`.
        cells: As in `run`.
        stem: As in `run`.
        modes: Memory mode of each cell.
        context: Keyword arguments that all cells share; `step` accepts others.
        taps: As in `run`.
        verify: As in `run`.
        kept: As in `run`.
        offloaded: As in `run`.
        products: As in `run`.

    Raises:
        ArgumentError: If the stem is an inference tensor, which autograd does not support.
    """

    def __init__(
        self,
        graph: Graph,
        cells: Sequence[nn.Module],
        stem: Tensor,
        modes: Sequence[Memory],
        context: Mapping[str, Any],
        taps: Sequence[int] = (),
        verify: bool = False,
        kept: Kept = _NONE,
        offloaded: Collection[int] = (),
        products: Products = _NO_PRODUCTS,
    ):
        super().__init__(graph, cells, stem, taps)
        if stem.is_inference():
            raise ArgumentError(
                "the input was created under torch.inference_mode(), which autograd does not support; clone() it, or "
                "create it under torch.no_grad()",
                "x",
                code="invalid-value",
            )
        self.modes = modes
        self.context = context
        self.tape = Tape(graph, cells, stem, context, verify, kept, offloaded, products)
        self.started = False  # whether a cell so far needed a gradient

    def step(self, node: Node, context: Mapping[str, Any]) -> Tensor:
        past, reads = self._past(node), self._reads(node)
        self.started = self.started or _needs_grad(self.cells[node.index], reads, context)
        if self.started:
            state = self.tape.record(node, reads, past, self.modes[node.index], context, context is self.context)
        else:
            state = self._call(node, reads, past, context)
            self.tape.skip()
        self._advance(node, state)
        return state

    def close(self) -> None:
        self.tape.close(self.states)  # includes states without a successor, which cannot be rebuilt


def _run_plain(
    graph: Graph, cells: Sequence[nn.Module], stem: Tensor, context: Mapping[str, Any], taps: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    run = PlainPass(graph, cells, stem, taps)
    for node in graph.nodes:
        run.step(node, context)
    return run.results()


@without_dynamo  # the tape is plain Python; compile() of the columns compiles the cells
def _run_taped(
    graph: Graph,
    cells: Sequence[nn.Module],
    stem: Tensor,
    modes: Sequence[Memory],
    context: Mapping[str, Any],
    taps: Sequence[int],
    verify: bool,
    kept: Kept,
    offloaded: Collection[int],
    products: Products,
) -> tuple[list[Tensor], list[Tensor]]:
    if is_inside():
        return _run_plain(graph, cells, stem, context, taps)
    run = TapedPass(graph, cells, stem, modes, context, taps, verify, kept, offloaded, products)
    for node in graph.nodes:
        run.step(node, context)
    run.close()
    return run.results()


def invert(
    graph: Graph, cells: Sequence[nn.Module], last: Sequence[Tensor], stem: Tensor, context: Mapping[str, Any]
) -> list[list[Tensor]]:
    """Rebuild all states from the last ones, without recording gradients.

    Args:
        graph: As in `run`.
        cells: As in `run`.
        last: The states `graph.last`.
        stem: As in `run`.
        context: As in `run`.

    Returns:
        A list of states per column, last column first; within a column, level 0 first.
    """
    states = dict(zip(graph.last, last, strict=True))
    with torch.no_grad():
        for node in reversed(graph.nodes):
            if node.residual is None:
                continue
            reads = [stem if read == STEM else states[read] for read in node.reads]
            states[node.residual] = cells[node.index](*reads, couple=partial(subtract, states[node.index]), **context)
    return [[states[index] for index in graph.states_of(column)] for column in reversed(range(graph.columns))]


def _needs_grad(cell: nn.Module, reads: list[Tensor], context: Mapping[str, Any]) -> bool:
    return (
        any(read.requires_grad for read in reads)
        or any(parameter.requires_grad for parameter in cell.parameters())
        or any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(dict(context)))
    )


@without_dynamo
def warn_of_pending(columns: Any, budget: Budget) -> None:
    """Warn once per budget that it is still pending. Gradients are correct without a plan, so this is no error."""
    if columns.warned_of is budget:
        return
    columns.warned_of = budget
    warnings.warn(
        f"the memory budget {budget.budget} is still pending in a training forward pass, so the columns run in "
        f"{'/'.join(dict.fromkeys(columns.memory))} without a plan: the model that contains them was not called as "
        "model(x). Call it, pass the module that you call to revnets.keep_budget, or plan first: "
        "revnets.plan(model, shape, budget=...).apply(model)",
        stacklevel=3,
    )


def tap_index(graph: Graph, column: int) -> int:
    """Return the index of a column's top-level state, which is the first one in a column that runs down.

    Raises:
        ArgumentError: If the column does not exist.
    """
    if isinstance(column, bool) or not 0 <= column < graph.columns:
        raise ArgumentError(
            f"taps: there is no column {column!r}; columns are numbered 0 to {graph.columns - 1}",
            "taps",
            code="out-of-range",
        )
    return graph.states_of(column)[-1]
