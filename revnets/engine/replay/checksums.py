"""Checksums of states, which verify bit for bit that backward uses the states of the forward pass.

Three kinds of states may differ: a rebuilt state, if F_t differs in the replay; the state that a replay computes, if
nothing was rebuilt (`recompute`, the first column); and in `invert` every state, by rounding errors. The last kind is
expected, so states that depend on `invert` are not compared (docs/concepts/numerical-drift.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from revnets.engine.errors import ReconstructionError
from revnets.engine.graph import Graph, Node
from revnets.engine.lost_bits import bits_of
from revnets.engine.memory_mode import Memory
from revnets.engine.torch_internals import has_values

CAUSES = (
    "Usual causes: a nondeterministic kernel (torch.use_deterministic_algorithms(True) names it), or a cell with "
    "hidden state: a cache, a counter, random numbers of Python or NumPy"
)


class Verifier:
    """The checksums of one pass."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.sums: dict[int, Tensor] = {}
        self.drifted: set[int] = set()  # rebuilt by `invert`, or from such states

    def note(self, index: int, state: Tensor) -> None:
        """Record the checksum of a state of the forward pass, without waiting for its device."""
        if has_values(state):
            self.sums[index] = checksum(state.detach())

    def rebuilt(self, node: Node, name: str, mode: Memory, past: Tensor) -> None:
        """Compare x_{t-m} as rebuilt by the replay of cell t.

        Args:
            node: Cell t.
            name: Description of the cell for the message.
            mode: Memory mode of the cell.
            past: The rebuilt state.

        Raises:
            ReconstructionError: If the state differs from the forward pass.
        """
        assert node.residual is not None
        if mode is Memory.INVERT or self._has_drifted(node):
            self.drifted.add(node.residual)
        elif self._differs(node.residual, past):
            raise ReconstructionError(
                f"the state of {self._place(node.residual)} was not rebuilt bit for bit: the replay of {name}, at "
                f"{self._place(node.index)}, computes something else than its forward pass. {CAUSES}",
                cell=self.graph.name(node.index),
            )

    def replayed(self, node: Node, name: str, state: Tensor) -> None:
        """Compare x_t as recomputed by the replay of cell t.

        Args:
            node: Cell t.
            name: Description of the cell for the message.
            state: The recomputed state.

        Raises:
            ReconstructionError: If the state differs from the forward pass.
        """
        if node.residual not in self.drifted and not self._has_drifted(node) and self._differs(node.index, state):
            raise ReconstructionError(
                f"{name}, at {self._place(node.index)}, computes another state in its replay than in its forward pass. "
                f"{CAUSES}",
                cell=self.graph.name(node.index),
            )

    def _has_drifted(self, node: Node) -> bool:
        return not self.drifted.isdisjoint((node.index, *node.reads))

    def _differs(self, index: int, state: Tensor) -> bool:
        expected = self.sums.get(index)  # None for fake tensors, and before the first cell that needs a gradient
        return expected is not None and not torch.equal(checksum(state.detach()), expected)

    def _place(self, index: int) -> str:
        node = self.graph.nodes[index]
        return f"column {node.column}, level {node.level}"


def checksum(state: Tensor) -> Tensor:
    """Return two wrapped int64 sums of a dense tensor's bits, on its device.

    The bits form a table whose rows have the length of the last axis. The sum of each row and of each column has a
    different weight, so that differences of one unit in the last place do not cancel as in a plain sum.
    """
    bits = bits_of(state)
    width = state.shape[-1] if state.ndim and state.shape[-1] else 1
    table = bits.view(-1, width)
    return torch.stack([_weighted(table.sum(axis, dtype=torch.int64)) for axis in (0, 1)])


def _weighted(sums: Tensor) -> Tensor:
    weights = torch.arange(1, 2 * sums.numel() + 1, 2, device=sums.device) * 0x9E3779B97F4A7C1  # odd; it wraps
    return (sums * weights).sum()
