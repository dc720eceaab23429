"""Reversible sequences and columns of cells: the modules that networks are built from."""

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
    """Cells connected into columns of m levels, which keep almost nothing for backward.

    The attributes `memory`, `stored`, `kept`, `products`, `offloaded`, `verify`, `budget` and `policy` control what is
    kept. They can be changed at any time and are not part of the state dict.

    Args:
        graph: Inputs and residual of each cell, see `revnets.wire`.
        cells: One `Cell` per node, in order.
        memory: Memory mode `store`, `recompute`, `invert` or `exact`, for all columns or one per column.
        verify: Compare a checksum of every state with the state that backward rebuilds, which raises a
            `ReconstructionError` if they differ. For debugging: on a GPU, backward then waits for every cell.

    Attributes:
        graph: The graph of the cells.
        cells: The cell of column c, level l is `cells[c][l]`, in either direction of the column.

    Raises:
        ArgumentError: If the number of cells is not the number of nodes, a cell has a gain without a residual or a
            residual without a gain, or `memory` is invalid.

    Example:
        >>> graph = revnets.wire(6, 3, [[1]] * 3)  # 2 columns of 3 levels; each cell reads the previous state
        >>> gains = [None] * 3 + [revnets.Gain(8) for _ in range(3)]
        >>> columns = revnets.ReversibleColumns(graph, [revnets.Cell(nn.Linear(8, 8), gain) for gain in gains])
        >>> levels = columns(torch.randn(4, 8))
    """

    warned_of: Budget | None = None

    def __init__(
        self, graph: Graph, cells: Sequence[Cell], memory: str | Sequence[str] = "exact", verify: bool = False
    ):
        super().__init__()
        if len(cells) != len(graph.nodes):
            text = f"the graph has {len(graph.nodes)} nodes, but there are {len(cells)} cells; give one per node"
            raise ArgumentError(text, "cells", code="wrong-length")
        for node, cell in zip(graph.nodes, cells, strict=True):
            if (cell.gain is None) != (node.residual is None):
                text = f"{graph.name(node.index)}: a cell with a residual needs a gain, one without must not have any"
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
        """Return all cells in the order in which they run."""
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
        """Run the cells and return the states of the last column.

        In training, a memory budget that is still pending here causes a warning: the model was not called in a way that
        plans the budget, so the columns run in their current memory modes.

        Args:
            x: The stem's output, shape (B, ..., C).
            taps: Columns whose top-level state is also returned. It stays alive as long as the caller holds it.
            stop: Index of the first cell that does not run, nor do the cells after it; by default all cells run.
            context: Keyword arguments for the function of every cell, such as a padding mask.

        Returns:
            A list of m states, level 0 first in either direction. States that a level of the same column replaced are
            omitted. If the last column is incomplete, the latest states of its missing levels come first. With `taps`,
            a pair of that list and the list of intermediate outputs.

        Raises:
            ArgumentError: If a column of `taps` or the cell `stop` does not exist.
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
        """Return columns that share the first cells and keep their memory policy.

        The policy of omitted cells is dropped; a pending budget stays pending.

        Args:
            length: Number of cells, at least 1.

        Raises:
            ArgumentError: `length` is below 1 or above the number of cells.
        """
        graph = _first(self.graph, length, "length")
        result = ReversibleColumns(graph, self.flat()[:length])
        for module in (result, result.cells, *result.cells):  # the cells keep their own flags
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
        """Divide the columns into pipeline stages that share the cells, as for `torch.distributed.pipelining`.

        Args:
            stages: Number of stages.
            stem: Runs in the first stage, before its cells.
            head: Runs in the last stage, on the list of states that the columns return.
            balance: What to distribute evenly: `bytes` of weights, `flops` of a forward pass for `x`, number of
                `cells`, or custom costs, one per cell.
            x: Input of the stem, or of the columns if there is no stem. Its values do not matter.

        Returns:
            One module per stage.

        Raises:
            ArgumentError: If there are fewer cells than stages, `balance` is unknown, the memory mode is `invert`, or a
                budget is pending.
        """
        from revnets.engine.pipeline.stage import stages_of  # rarely needed

        return stages_of(self, stages, stem, head, balance, x)

    def inverse(self, levels: Sequence[Tensor], x: Tensor, **context: Any) -> list[list[Tensor]]:
        """Rebuild the states of all columns from the states of the last one, without a forward pass.

        This is the plain inverse: rounding errors grow with every column (docs/concepts/numerical-drift.md). A cell
        that draws random numbers cannot be inverted, so call `eval()` first.

        Args:
            levels: The states that `forward` returned.
            x: The stem's output, as passed to `forward`.
            context: Keyword arguments that were passed to `forward`.

        Returns:
            A list of states per column, last column first; within a column, level 0 first.

        Raises:
            ArgumentError: If the number of states is wrong, or cells without residuals make the inverse impossible.
        """
        if not self.graph.is_invertible:
            text = "some cells have no residual, so earlier states cannot be rebuilt from the last ones"
            raise ArgumentError(text, "residuals", code="no-columns")
        expected = len(self.graph.last)
        if len(levels) != expected:
            text = f"got {len(levels)} states; the inverse needs the last {expected}, as returned by the forward pass"
            raise ArgumentError(text, "levels", code="wrong-length")
        return executor.invert(self.graph, self.flat(), levels, x, context)

    def compile(self, *args: Any, dynamic: bool | None = False, **kwargs: Any) -> None:
        """Compile the function of every cell.

        Use this method for training: `torch.compile` of the whole module does not compile cells outside mode `store`.

        Args:
            args: Positional arguments of `torch.compile`.
            dynamic: As in `torch.compile`, but static by default: with dynamic shapes, Dynamo may recompile a cell
                between its forward pass and its replay, which may then save other tensors.
            kwargs: Other arguments of `torch.compile`.
        """
        cells = self.flat()
        raise_compile_limits(_VERSIONS * len(cells))
        for cell in cells:
            cell.compile(*args, dynamic=dynamic, **kwargs)

    def extra_repr(self) -> str:
        modes = {str(mode) for mode in self.memory}
        return f"m={self.graph.m}, columns={self.graph.columns}, memory={'/'.join(sorted(modes))}"


class ReversibleSequence(ReversibleColumns):
    """Custom modules as a reversible sequence: x_t = F_t(x_{t-1}, ...) + gamma * x_{t-m}.

    The first m modules have no x_{t-m} and start the sequence. To start with two equal streams, as RevViT does, pass
    `nn.Identity()` for the first two modules.

    Args:
        functions: Modules F_t, called with their inputs in order; a `Cell` is used unchanged.
        m: Offset of the residual; RevNet, RevViT and Reformer use m = 2.
        reads: Inputs of each F_t: offsets k (for x_{t-k}) from 1 to m - 1, or names from
            `revnets.engine.graph.READS`. A cell without inputs reads `x`.
        gain: Constant gamma of every residual. For learned gains, pass cells.
        memory: As in `ReversibleColumns`.
        verify: As in `ReversibleColumns`.

    Raises:
        ArgumentError: `gain` is 0, or `memory` is invalid.
        ReadError: `m` or `reads` is invalid, or there are no functions.

    Example:
        >>> blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(12)]
        >>> sequence = revnets.ReversibleSequence(blocks)
        >>> sequence(torch.randn(4, 8))[-1].sum().backward()
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
"""How often a cell may be compiled, for other shapes or without gradients: PyTorch's default for one function."""


def _first(graph: Graph, length: int, name: str) -> Graph:
    """Return the graph of the first cells; `name` is the argument that holds their number, for the error."""
    total = len(graph.nodes)
    if not 1 <= length <= total:
        raise ArgumentError(f"{name} = {length}: give a number of cells, 1 to {total}", name, code="out-of-range")
    return graph if length == total else Graph(graph.m, graph.nodes[:length])
