# pyright: reportUnnecessaryIsInstance=false
"""From reads to nodes and wires. Plain Python: no torch, so it can be tested and drawn without it.

A column net is one sequence of states x_0 ... x_{T-1}. With m levels, state t belongs to column t // m and
level t % m (RevCol, ICLR 2023, section 2.1, Eq. 2):

    x_t = F_t(reads) + gamma_t * x_{t-m}

x_t takes the place of x_{t-m}, which can be rebuilt from it. The inverse can only be taken if every read is still there
once x_t is: a cell may read states that no other has replaced, the window x_{t-1} ... x_{t-m+1}, and the stem.

Other nets are the same sequence with other residuals, level by level. With x_{t-2} at most levels, and none where the
resolution changes, one long column is a RevNet in stages. Without any residual nothing is replaced, and a cell may
read the whole column before, as the branches of HRNet do; then nothing can be rebuilt either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

STEM = -1
"""Index that stands for the stem's output in `Node.reads`."""

READS = ("below", "above", "stem", "top", "full", "before")
"""Reads that have a name. An integer k, 1 <= k <= m - 1, reads x_{t-k}."""

ReadToken = str | int


@dataclass(frozen=True, slots=True)
class Node:
    """One cell: where it stands, which states it reads, and which state it replaces."""

    index: int  # t, the place in the sequence
    column: int  # t // m
    level: int  # t % m, 0 is nearest to the image
    reads: tuple[int, ...]  # indices of states, or STEM
    residual: int | None  # the state that it replaces, x_{t-m} in RevCol; None where there is none, and so no gain


@dataclass(frozen=True, slots=True)
class Graph:
    """All nodes of a sequence, in the order in which they run."""

    m: int
    nodes: tuple[Node, ...]
    window: int = field(init=False)  # so many states back from x_t are all that cells need, besides the stem
    last: tuple[int, ...] = field(init=False)  # states of the last column that are left at the end

    def __post_init__(self) -> None:
        needs = ((node.index, need) for node in self.nodes for need in (*node.reads, node.residual))
        window = max([self.m, *(index - need for index, need in needs if need is not None and need != STEM)])
        # Fields, for Dynamo cannot trace a cached_property: it takes a lock in Python 3.11.
        object.__setattr__(self, "window", window)
        total, replaced = len(self.nodes), self.replaced
        last = tuple(index for index in range(max(0, total - self.m), total) if index not in replaced)
        object.__setattr__(self, "last", last)

    @property
    def columns(self) -> int:
        return self.nodes[-1].column + 1

    @property
    def replaced(self) -> set[int]:
        """States that a later one has taken the place of, and gives back."""
        return {node.residual for node in self.nodes if node.residual is not None}

    @property
    def is_invertible(self) -> bool:
        """Do the last column's states give back all others?"""
        return len(self.replaced) + len(self.last) == len(self.nodes)

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
    """An argument of `wire` cannot be used, such as a read that no cell of this level can have.

    Attributes:
        key, code: as those of `revnets.engine.errors.ArgumentError`; importing that one would import torch.
    """

    def __init__(self, message: str, key: str = "reads", code: str = "invalid-value"):
        super().__init__(message)
        self.key, self.code = key, code


def wire(length: int, m: int, reads: Sequence[Sequence[ReadToken]], residuals: Sequence[int] | None = None) -> Graph:
    """Wire `length` cells into columns of m levels; `reads[l]` lists what level l reads.

    Args:
        length: number of cells T; the last column may be shorter than m.
        m: levels per column, at least 2.
        reads: per level, names out of `READS` or offsets k for x_{t-k}.
        residuals: per level, k for the residual x_{t-k}, 1 <= k <= m; 0 for none. By default m everywhere.

    Raises:
        ReadError: too few levels or cells; an unknown name, an offset outside the window, or a state that another one
            has replaced.
    """
    if m < 2:
        raise ReadError(f"m = {m}: a reversible column has at least 2 levels", "m", code="out-of-range")
    if length < 1:
        raise ReadError(f"length = {length}: at least one cell is needed", "length", code="out-of-range")
    nodes: list[Node] = []
    replaced: dict[int, int] = {}  # by which state
    for t in range(length):
        column, level = divmod(t, m)
        step = m if residuals is None else residuals[level]
        residual = t - step if step and t >= step else None
        if residual is not None:
            if residual in replaced:
                text = f"level {level}: its residual, {step} states back, is taken by a level between"
                raise ReadError(text, "residuals", code="conflicting-values")
            replaced[residual] = t
        wires: dict[int, None] = {}  # a set that keeps the order
        for token in reads[level]:
            for read in _resolve(token, t, m):
                if read in replaced:
                    raise ReadError(
                        f"level {level} reads a state {t - read} back, which is replaced by then: it is the residual "
                        f"of level {replaced[read] % m}. Without residuals (0) nothing is",
                        "reads",
                        code="conflicting-values",
                    )
                if read >= 0 or read == STEM:
                    wires[read] = None
        # Whoever would read nothing (the first cell of a net without stem reads) starts from the stem.
        nodes.append(Node(t, column, level, tuple(wires) or (STEM,), residual))
    return Graph(m, tuple(nodes))


def _resolve(token: ReadToken, t: int, m: int) -> list[int]:
    """Indices that a token means at cell t; -2 stands for a state that does not exist."""
    nowhere = STEM - 1
    level = t % m
    start = t - level  # first state of this column

    def state(k: int) -> int:
        return t - k if t >= k else nowhere

    if isinstance(token, bool) or not isinstance(token, (str, int)):
        raise ReadError(
            f"{token!r} is neither a name out of {', '.join(READS)} nor an offset", "reads", code="wrong-type"
        )
    if isinstance(token, int):
        if not 1 <= token <= m - 1:
            text = f"offset {token} reaches out of the window: with {m} levels a cell can read x_(t-1) to x_(t-{m - 1})"
            raise ReadError(text, "reads", code="out-of-range")
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
    if token == "before":
        return list(range(start - m, start)) if start else []
    text = f"{token!r} is not a read; there are {', '.join(READS)}, and offsets 1 to {m - 1}"
    raise ReadError(text, "reads", code="unknown-choice")
