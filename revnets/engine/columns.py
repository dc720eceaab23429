"""Reversible sequences and columns of cells: the modules that people build nets from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from revnets.engine import executor
from revnets.engine.cell import Cell, FixedGain
from revnets.engine.errors import ArgumentError
from revnets.engine.graph import Graph, ReadToken, wire
from revnets.engine.memory_mode import Memory, MemoryPolicy, PolicyAttributes, memory_modes
from revnets.engine.torch_internals import raise_compile_limits

if TYPE_CHECKING:
    from revnets.engine.budget import Budget
    from revnets.engine.pipeline.stage import ColumnsStage


class ReversibleColumns(PolicyAttributes, nn.Module):
    """Cells wired into columns of m levels, trained with next to nothing kept for backward.

    Args:
        graph: which cell reads what, see `revnets.engine.graph.wire`.
        cells: one `Cell` per node, in order. `self.cells[c][l]` is the cell at column c, level l, in either
            direction.
        memory: `store`, `recompute`, `invert` or `exact`, or one of them per column. It can be changed at any time
            through the attribute `memory`; it is no part of the state dict.
        verify: keep a checksum of every state and compare it with the state that backward rebuilds; raises a
            `ReconstructionError` there if they differ. For debugging: on a GPU, backward then waits for every cell.
            It can be switched at any time through the attribute `verify`.

    Attributes:
        policy, memory, stored, kept, products, offloaded, verify, budget: what is kept for backward, see
            `PolicyAttributes`.
    """

    warned_of: Budget | None = None

    def __init__(
        self, graph: Graph, cells: Sequence[Cell], memory: str | Sequence[str] = "exact", verify: bool = False
    ):
        super().__init__()
        if len(cells) != len(graph.nodes):
            text = f"the graph has {len(graph.nodes)} nodes, but {len(cells)} cells were given"
            raise ArgumentError(text, "cells", code="wrong-length")
        for node, cell in zip(graph.nodes, cells, strict=True):
            if (cell.gain is None) != (node.residual is None):
                text = f"{graph.name(node.index)}: a cell has a gain exactly if it has a residual"
                raise ArgumentError(text, "cells", code="conflicting-values")
        self.graph = graph
        self.cells = nn.ModuleList(
            nn.ModuleList(cells[index] for index in graph.states_of(column)) for column in range(graph.columns)
        )
        self._policy = MemoryPolicy(memory_modes(memory, graph.columns), verify=verify)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_policy" not in state:  # pickled before there was a policy
            state = dict(state)
            fields = [state.pop(name) for name in ("_memory", "_stored", "verify", "budget")]
            state["_policy"] = MemoryPolicy(*fields)
        super().__setstate__(state)  # pyright: ignore[reportUnknownMemberType]

    def flat(self) -> list[Cell]:
        """All cells in the order in which they run."""
        found: list[Cell] = []
        for index, column in enumerate(self.cells):
            cells = list(cast(Iterable[Cell], column))
            found += cells[::-1] if self.graph.is_down(index) else cells
        return found

    @overload
    def forward(self, x: Tensor, *, taps: tuple[()] = (), stop: int | None = None, **context: Any) -> list[Tensor]: ...
    @overload
    def forward(
        self, x: Tensor, *, taps: Sequence[int], stop: int | None = None, **context: Any
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]: ...

    def forward(
        self, x: Tensor, *, taps: Sequence[int] = (), stop: int | None = None, **context: Any
    ) -> list[Tensor] | tuple[list[Tensor], list[Tensor]]:
        """The last column's states, level 0 first.

        In training, a memory budget that is still pending here is warned of: whatever was called is not an entry of
        the model that plans it, and the columns run in their present memory modes.

        Args:
            x: the stem's output; channels are the last axis.
            taps: columns whose top level is handed out as well. A tapped state stays alive as long as its caller
                holds it.
            stop: index of the first cell that is left out, and with it all later ones; by default all cells run.
            context: keyword arguments for the function of every cell, such as a padding mask.

        Returns:
            A list of m states, level 0 first also where the last column runs down, or of those among them that no
            other level has replaced (residuals within a column); with taps, the pair (that list, list of tapped
            states). If the last column is cut short, the levels that it lacks come first, from the column before.

        Raises:
            ArgumentError: there is no such tap or cell.
        """
        policy, graph, cells = self._policy, self.graph, self.flat()
        if stop is not None:
            graph, cells = _first(graph, stop, "stop"), cells[:stop]
        if policy.budget is not None and self.training and torch.is_grad_enabled() and not executor.is_transformed():
            executor.warn_of_pending(self, policy.budget)
        if Memory.INVERT in policy.modes and torch.is_grad_enabled() and not executor.is_transformed():
            from revnets.engine import drift  # no other mode drifts

            drift.watch(self, x)
        ends = [executor.tap_index(graph, tap) for tap in taps]
        ways = policy.modes, context, ends, policy.stored, policy.verify, dict(policy.kept), policy.offloaded
        last, tapped = executor.run(graph, cells, x, *ways, dict(policy.products))
        return (last, tapped) if taps else last

    def truncated(self, length: int) -> ReversibleColumns:
        """The first `length` cells as columns that share them, under the same policy.

        Stored and offloaded cells that are left out leave the policy as well; a pending budget stays pending.

        Raises:
            ArgumentError: there is no cell left, or there are not so many.
        """
        graph = _first(self.graph, length, "length")
        result = ReversibleColumns(graph, self.flat()[:length])
        for module in (result, result.cells, *result.cells):  # the flags of the cells are their own
            module.training = self.training
        policy, modes = self._policy, self.memory[: graph.columns]
        stored, offloaded = (
            frozenset(index for index in cells if index < length) for cells in (policy.stored, policy.offloaded)
        )
        kept = tuple((index, replayed) for index, replayed in policy.kept if index < length)
        products = tuple((index, numbers) for index, numbers in policy.products if index < length)
        result.policy = replace(policy, modes=modes, stored=stored, kept=kept, offloaded=offloaded, products=products)
        return result

    def split(
        self,
        stages: int,
        *,
        stem: nn.Module | None = None,
        head: nn.Module | None = None,
        balance: str | Sequence[float] = "bytes",
        x: Tensor | None = None,
    ) -> list[ColumnsStage]:
        """Stages of a pipeline that share the cells; arguments and errors are those of `pipeline.stage.stages_of`."""
        from revnets.engine.pipeline.stage import stages_of  # few nets are divided

        return stages_of(self, stages, stem, head, balance, x)

    def inverse(self, levels: Sequence[Tensor], x: Tensor, **context: Any) -> list[list[Tensor]]:
        """The states of every column, last column first, from the states of the last one. No forward is needed.

        It is the plain inverse: rounding errors grow from column to column (docs/concepts/numerical-drift.md), and a
        cell that draws random numbers cannot be undone, so call `eval()` first.

        Args:
            levels: the states that `forward` returned.
            x: the stem's output, as given to `forward`.

        Raises:
            ArgumentError: another number of states, or cells without residuals, behind which nothing comes back.
        """
        if not self.graph.is_invertible:
            text = "cells without residuals replace no state, and so give none back; nothing can be inverted"
            raise ArgumentError(text, "residuals", code="no-columns")
        expected = len(self.graph.last)
        if len(levels) != expected:
            text = f"{len(levels)} states were given; the inverse starts from the last {expected}"
            raise ArgumentError(text, "levels", code="wrong-length")
        return executor.invert(self.graph, self.flat(), levels, x, context)

    def compile(self, *args: Any, dynamic: bool | None = False, **kwargs: Any) -> None:
        """Compile the function of every cell; the arguments are those of `torch.compile`.

        Shapes are static unless asked for otherwise: with dynamic ones, Dynamo may compile a cell anew between its
        forward and its replay, which then need not save the same tensors.

        While gradients are recorded this is the way to compile: `torch.compile` of the whole module leaves the cells
        of columns with another mode than `store` as they are.
        """
        cells = self.flat()
        raise_compile_limits(_VERSIONS * len(cells))
        for cell in cells:
            cell.compile(*args, dynamic=dynamic, **kwargs)

    def extra_repr(self) -> str:
        modes = {str(mode) for mode in self.memory}
        return f"m={self.graph.m}, columns={self.graph.columns}, memory={'/'.join(sorted(modes))}"


class ReversibleSequence(ReversibleColumns):
    """The same engine for anyone's own modules: x_t = F_t(x_{t-1}, ...) + gamma * x_{t-m}.

    The first m modules start the sequence (there is no x_{t-m} for them). To begin with two equal streams, as RevViT
    does, let the first two modules be `nn.Identity()`.

    Args:
        functions: modules F_t, called with their reads in order; a `Cell` is taken as it is.
        m: how far back the residual reaches; RevNet, RevViT and Reformer have m = 2.
        reads: what each F_t reads: offsets k (for x_{t-k}) between 1 and m - 1, or names out of
            `revnets.engine.graph.READS`. A cell that would read nothing reads the input.
        gain: fixed gamma of every residual. For learned gains pass cells of your own.
        memory, verify: as in `ReversibleColumns`.
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        m: int = 2,
        reads: Sequence[ReadToken] = (1,),
        gain: float = 1.0,
        memory: str | Sequence[str] = "exact",
        verify: bool = False,
    ):
        cells = [
            function if isinstance(function, Cell) else Cell(function, FixedGain(gain) if t >= m else None)
            for t, function in enumerate(functions)
        ]
        super().__init__(wire(len(cells), m, [reads] * m), cells, memory, verify)


_VERSIONS = 8
"""How often a cell may be compiled, for other shapes or without gradients: PyTorch's own limit for one function."""


def _first(graph: Graph, length: int, name: str) -> Graph:
    """The first cells; `name` is the argument that gives their number."""
    total = len(graph.nodes)
    if not 1 <= length <= total:
        raise ArgumentError(
            f"the first {length} cells: there are {total}, and at least one must run", name, code="out-of-range"
        )
    return graph if length == total else Graph(graph.m, graph.nodes[:length])
