"""Does backward compute with what the forward computed? A checksum of every state tells, to the bit.

Three things may come back otherwise: a state that is rebuilt, because its cell's F_t is another one in the replay; the
state that a replay gives, where nothing was rebuilt (`recompute`, the first column); and, in `invert`, every state a
little, from rounding. The latter is no mistake: states that come from `invert` are not compared
(docs/concepts/numerical-drift.md).
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
    "Usual causes: a kernel that is not deterministic (torch.use_deterministic_algorithms(True) names it), or a cell "
    "with a hidden state: a cache, a counter, random numbers of Python or NumPy"
)


class Verifier:
    """The checksums of one pass."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.sums: dict[int, Tensor] = {}
        self.drifted: set[int] = set()  # rebuilt by `invert`, or from such states

    def note(self, index: int, state: Tensor) -> None:
        """Remember a state of the forward, without waiting for its device."""
        if has_values(state):
            self.sums[index] = checksum(state.detach())

    def rebuilt(self, node: Node, name: str, mode: Memory, past: Tensor) -> None:
        """x_{t-m}, as the replay of cell t gives it back."""
        assert node.residual is not None
        if mode is Memory.INVERT or self._has_drifted(node):
            self.drifted.add(node.residual)
        elif self._differs(node.residual, past):
            raise ReconstructionError(
                f"the state of {self._place(node.residual)} comes back with other bits than it had. It was rebuilt by "
                f"{name}, at {self._place(node.index)}, whose replay computes something else than its forward. "
                f"{CAUSES}",
                cell=self.graph.name(node.index),
            )

    def replayed(self, node: Node, name: str, state: Tensor) -> None:
        """x_t, as the replay of cell t computes it again."""
        if node.residual not in self.drifted and not self._has_drifted(node) and self._differs(node.index, state):
            raise ReconstructionError(
                f"{name}, at {self._place(node.index)}, gives another state in its replay than in its forward. "
                f"{CAUSES}",
                cell=self.graph.name(node.index),
            )

    def _has_drifted(self, node: Node) -> bool:
        return not self.drifted.isdisjoint((node.index, *node.reads))

    def _differs(self, index: int, state: Tensor) -> bool:
        expected = self.sums.get(index)  # none of fake tensors, and of cells below the first that needs a gradient
        return expected is not None and not torch.equal(checksum(state.detach()), expected)

    def _place(self, index: int) -> str:
        node = self.graph.nodes[index]
        return f"column {node.column}, level {node.level}"


def checksum(state: Tensor) -> Tensor:
    """Two wrapped int64 sums of a dense tensor's bits, on its device.

    Seen as a table whose rows are of the last axis' length, each row's sum and each column's has a weight of its own:
    differences of one unit in the last place, which come with both signs, do not cancel out as in a plain sum.
    """
    bits = bits_of(state)
    width = state.shape[-1] if state.ndim and state.shape[-1] else 1
    table = bits.view(-1, width)
    return torch.stack([_weighted(table.sum(axis, dtype=torch.int64)) for axis in (0, 1)])


def _weighted(sums: Tensor) -> Tensor:
    weights = torch.arange(1, 2 * sums.numel() + 1, 2, device=sums.device) * 0x9E3779B97F4A7C1  # odd; it wraps
    return (sums * weights).sum()
