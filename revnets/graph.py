"""From reads to nodes and wires. Plain Python: no torch, so it can be tested and drawn without it.

A column net is one sequence of states x_0 ... x_{T-1}. With m levels, state t belongs to column t // m and
level t % m (RevCol, ICLR 2023, section 2.1, Eq. 2):

    x_t = F_t(reads) + gamma_t * x_{t-m}

The inverse can only be taken if every read is still there once x_t is: a cell may read the states of the window
x_{t-1} ... x_{t-m+1} and the stem, nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEM = -1
"""Index that stands for the stem's output in `Node.reads`."""

READS = ("below", "above", "stem", "top", "full")
"""Reads that have a name. An integer k, 1 <= k <= m - 1, reads x_{t-k}."""

ReadToken = str | int


@dataclass(frozen=True, slots=True)
class Node:
    """One cell: where it stands, which states it reads, and which state it replaces."""

    index: int  # t, the place in the sequence
    column: int  # t // m
    level: int  # t % m, 0 is nearest to the image
    reads: tuple[int, ...]  # indices of states, or STEM
    residual: int | None  # t - m; None in the first column, which has no gain


@dataclass(frozen=True, slots=True)
class Graph:
    """All nodes of a sequence, in the order in which they run."""

    m: int
    nodes: tuple[Node, ...]

    @property
    def columns(self) -> int:
        return self.nodes[-1].column + 1

    def kind(self, node: Node, read: int) -> str:
        """`stem`, `below` (own column) or `above` (the column before): which way the wire comes."""
        if read == STEM:
            return "stem"
        return "below" if read >= node.column * self.m else "above"

    def name(self, index: int) -> str:
        return "stem" if index == STEM else f"c{index // self.m}.l{index % self.m}"

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (cell, what it reads, what its gain scales), as `revnets show` prints them."""
        return [
            (
                self.name(node.index),
                ", ".join(self.name(read) for read in node.reads),
                "-" if node.residual is None else self.name(node.residual),
            )
            for node in self.nodes
        ]


class ReadError(ValueError):
    """A read that no cell of this level can have."""


def wire(length: int, m: int, reads: Sequence[Sequence[ReadToken]]) -> Graph:
    """Wire `length` cells into columns of m levels; `reads[l]` lists what level l reads.

    Args:
        length: number of cells T; the last column may be shorter than m.
        m: levels per column, at least 2.
        reads: per level, names out of `READS` or offsets k for x_{t-k}.

    Raises:
        ReadError: an unknown name, or an offset outside the window.
    """
    if m < 2:
        raise ValueError(f"m = {m}: a reversible column has at least 2 levels")
    if length < 1:
        raise ValueError(f"length = {length}: at least one cell is needed")
    nodes = []
    for t in range(length):
        column, level = divmod(t, m)
        wires: dict[int, None] = {}  # a set that keeps the order
        for token in reads[level]:
            for read in _resolve(token, t, m):
                if read >= 0 or read == STEM:
                    wires[read] = None
        # Whoever would read nothing (the first cell of a net without stem reads) starts from the stem.
        nodes.append(Node(t, column, level, tuple(wires) or (STEM,), t - m if t >= m else None))
    return Graph(m, tuple(nodes))


def _resolve(token: ReadToken, t: int, m: int) -> list[int]:
    """Indices that a token means at cell t; -2 stands for a state that does not exist."""
    nowhere = STEM - 1
    level = t % m
    start = t - level  # first state of this column

    def state(k: int) -> int:
        return t - k if t >= k else nowhere

    if isinstance(token, bool) or not isinstance(token, (str, int)):
        raise ReadError(f"{token!r} is neither a name out of {', '.join(READS)} nor an offset")
    if isinstance(token, int):
        if not 1 <= token <= m - 1:
            raise ReadError(
                f"offset {token} reaches out of the window: with {m} levels a cell can read x_(t-1) to x_(t-{m - 1})"
            )
        return [state(token)]
    if token == "below":
        return [t - 1 if level else STEM]
    if token == "above":  # the top level has nothing above it
        return [state(m - 1)] if level < m - 1 else []
    if token == "stem":
        return [STEM]
    if token == "top":  # at the top level itself that is x_{t-m}, which the gain already brings
        return [start - 1 if start else nowhere] if level < m - 1 else []
    if token == "full":
        return ([] if level else [STEM]) + [state(k) for k in range(1, m)]
    raise ReadError(f"{token!r} is not a read; there are {', '.join(READS)}, and offsets 1 to {m - 1}")
