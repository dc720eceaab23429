# pyright: reportUnnecessaryIsInstance=false
"""From reads to nodes and wires. Plain Python: no torch, so it can be tested and drawn without it.

A column net is one sequence of states x_0 ... x_{T-1}. With m levels, state t belongs to column t // m and
level t % m (RevCol, ICLR 2023, section 2.1, Eq. 2):

    x_t = F_t(reads) + gamma_t * x_{t-m}

x_t takes the place of x_{t-m}, which can be rebuilt from it. The inverse can only be taken if every read is still there
once x_t is: a cell may read states that no other has replaced, the window x_{t-1} ... x_{t-m+1}, and the stem.

A column may also run from its top level down to level 0, as those of RevColV2's decoder do (Han, Cai, Zhang,
"RevColV2: Exploring Disentangled Representations in Masked Image Modeling", NeurIPS 2023). Its residuals are the same
levels of the column before. Where the direction turns, these lie 1, 3, 5, ... states back in place of m.

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
"""Reads that have a name. An integer k, 1 <= k <= m - 1, reads the level that runs k places before this one."""

DIRECTIONS = ("up", "down")
"""A column runs from level 0 up to level m - 1, or from there down."""

ReadToken = str | int


@dataclass(frozen=True, slots=True)
class Node:
    """One cell: where it stands, which states it reads, and which state it replaces."""

    index: int  # t, the place in the sequence
    column: int  # t // m
    level: int  # 0 is nearest to the image; t % m in a column that runs up
    reads: tuple[int, ...]  # indices of states, or STEM
    residual: int | None  # the state that it replaces, x_{t-m} in RevCol; None where there is none, and so no gain
    constant: bool = False  # does a learned constant enter here? It is a weight of F_t, not a state

    def __setstate__(self, state: Sequence[object]) -> None:
        for name, value in zip(Node.__slots__, (*state, False), strict=False):  # older pickles have no `constant`
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class Graph:
    """All nodes of a sequence, in the order in which they run."""

    m: int
    nodes: tuple[Node, ...]
    window: int = field(init=False)  # so many states back from x_t are all that cells need, besides the stem
    last: tuple[int, ...] = field(init=False)  # each level's latest state, if it is left at the end: level 0 first

    def __post_init__(self) -> None:
        total, replaced = len(self.nodes), self.replaced
        latest = {node.level: node for node in self.nodes}
        last = sorted(latest.values(), key=lambda node: (node.column, node.level))
        # Fields, for Dynamo cannot trace a cached_property: it takes a lock in Python 3.11.
        object.__setattr__(self, "last", tuple(node.index for node in last if node.index not in replaced))
        needs = ((node.index, need) for node in self.nodes for need in (*node.reads, node.residual))
        distances = [index - need for index, need in needs if need is not None and need != STEM]
        object.__setattr__(self, "window", max([self.m, *distances, total - min(self.last)]))

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

    def is_down(self, column: int) -> bool:
        """Does this column run from its top level down?"""
        return self.nodes[column * self.m].level > 0

    def states_of(self, column: int) -> range:
        """The states of a column, the lowest level first, whatever its direction."""
        states = range(column * self.m, min((column + 1) * self.m, len(self.nodes)))
        return states[::-1] if self.is_down(column) else states

    def kind(self, node: Node, read: int) -> str:
        """`stem`, `below` (own column) or `above` (the column before): which way the wire comes."""
        if read == STEM:
            return "stem"
        return "below" if read >= node.column * self.m else "above"

    def name(self, index: int) -> str:
        return "stem" if index == STEM else f"c{self.nodes[index].column}.l{self.nodes[index].level}"

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (cell, what it reads, what its gain scales), as `revnets show` prints them."""
        return [
            (
                self.name(node.index),
                ", ".join([*map(self.name, node.reads), *["constant"] * node.constant]),
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


def wire(
    length: int,
    m: int,
    reads: Sequence[Sequence[ReadToken]],
    residuals: Sequence[int] | None = None,
    directions: Sequence[str] | None = None,
    constant: int | None = None,
) -> Graph:
    """Wire `length` cells into columns of m levels; `reads[l]` lists what level l reads.

    A column that runs down is the mirror image of one that runs up: `below` is the level that has run just before in
    either, and `above` the one that runs next, in the column before. In other words, of every level but its own a cell
    can read the latest state.

    Args:
        length: number of cells T; the last column may be shorter than m.
        m: levels per column, at least 2.
        reads: per level, names out of `READS` or offsets k: the level k places before in the order of the column.
        residuals: per level, as offsets k, 1 <= k <= m; m is the level itself, one column before. 0 for none. By
            default m everywhere.
        directions: of each column, out of `DIRECTIONS`; the first one runs up. By default all do.
        constant: the column into whose first cell a learned constant enters, such as mask tokens.

    Raises:
        ReadError: too few levels or cells; an unknown name, an offset outside the window, or a state that another one
            has replaced; directions or a constant that do not fit the columns.
    """
    if m < 2:
        raise ReadError(f"m = {m}: a reversible column has at least 2 levels", "m", code="out-of-range")
    if length < 1:
        raise ReadError(f"length = {length}: at least one cell is needed", "length", code="out-of-range")
    columns = -(-length // m)
    directions = ("up",) * columns if directions is None else directions
    _check_directions(directions, columns)
    if constant is not None and (isinstance(constant, bool) or not 0 <= constant < columns):
        text = f"there is no column {constant!r}: columns are numbered from 0 to {columns - 1}"
        raise ReadError(text, "constant", code="out-of-range")
    nodes: list[Node] = []
    replaced: dict[int, int] = {}  # by a state of which level
    for t in range(length):
        place = _Place(t, m, directions)
        level = place.level
        step = m if residuals is None else residuals[level]
        residual = place.back(step) if step else None
        if residual is not None:
            if residual in replaced:
                text = f"level {level}: its residual, {step} states back, is taken by a level between"
                raise ReadError(text, "residuals", code="conflicting-values")
            replaced[residual] = level
        wires: dict[int, None] = {}  # a set that keeps the order
        for token in reads[level]:
            for read in _resolve(token, place):
                if read in replaced:
                    raise ReadError(
                        f"level {level} reads a state {t - read} back, which is replaced by then: it is the residual "
                        f"of level {replaced[read]}. Without residuals (0) nothing is",
                        "reads",
                        code="conflicting-values",
                    )
                wires[read] = None
        # Whoever would read nothing (the first cell of a net without stem reads) starts from the stem.
        enters = place.column == constant and place.position == 0
        nodes.append(Node(t, place.column, level, tuple(wires) or (STEM,), residual, enters))
    return Graph(m, tuple(nodes))


class _Place:
    """Where cell t runs: its column, its position in the order of the column, and its level."""

    def __init__(self, t: int, m: int, directions: Sequence[str]):
        self.m = m
        self.directions = directions
        self.column, self.position = divmod(t, m)
        self.is_down = directions[self.column] == "down"
        self.level = _mirrored(self.position, m, self.is_down)

    def back(self, k: int) -> int | None:
        """The latest state of the level that runs k places before this one, 1 <= k <= m; None if there is none yet."""
        before, position = divmod(self.position - k, self.m)
        column = self.column + before
        if column < 0:
            return None
        level = _mirrored(position, self.m, self.is_down)
        return column * self.m + _mirrored(level, self.m, self.directions[column] == "down")


def _mirrored(number: int, m: int, is_down: bool) -> int:
    """From the position in a column to the level, and from the level to the position."""
    return m - 1 - number if is_down else number


def _check_directions(directions: Sequence[str], columns: int) -> None:
    for direction in directions:
        if direction not in DIRECTIONS:
            text = f"{direction!r} is not a direction; there are {' and '.join(DIRECTIONS)}"
            raise ReadError(text, "directions", code="unknown-choice")
    if len(directions) != columns:
        text = f"{len(directions)} directions for {columns} columns; give one for each"
        raise ReadError(text, "directions", code="wrong-length")
    if directions[0] == "down":
        text = "the first column runs down, but one that runs up must come before: the stem enters at level 0"
        raise ReadError(text, "directions", code="conflicting-values")


def _resolve(token: ReadToken, place: _Place) -> list[int]:
    """Indices that a token means at a cell, without states that do not exist."""
    m, is_first, is_last = place.m, place.position == 0, place.position == place.m - 1
    offsets: Sequence[int] = ()
    stem: list[int] = []
    if isinstance(token, bool) or not isinstance(token, (str, int)):
        raise ReadError(
            f"{token!r} is neither a name out of {', '.join(READS)} nor an offset", "reads", code="wrong-type"
        )
    if isinstance(token, int):
        if not 1 <= token <= m - 1:
            text = f"offset {token} reaches out of the window: with {m} levels a cell can read x_(t-1) to x_(t-{m - 1})"
            raise ReadError(text, "reads", code="out-of-range")
        offsets = (token,)
    elif token == "below":
        offsets = () if is_first else (1,)
        stem = [STEM] if is_first and not place.is_down else []
    elif token == "above":  # the last level of a column has no next one
        offsets = () if is_last else (m - 1,)
    elif token == "stem":
        stem = [STEM]
    elif token == "top":  # where a column ends: at that level itself it is the residual, which the gain already brings
        offsets = () if is_last else (place.position + 1,)
    elif token == "full":
        offsets = range(1, m)
        stem = [STEM] if is_first and not place.is_down else []
    elif token == "before":
        start = place.column * m
        return list(range(start - m, start)) if start else []
    else:
        text = f"{token!r} is not a read; there are {', '.join(READS)}, and offsets 1 to {m - 1}"
        raise ReadError(text, "reads", code="unknown-choice")
    return stem + [state for state in map(place.back, offsets) if state is not None]
