# pyright: reportUnnecessaryIsInstance=false
"""The graph of cells: their inputs and residuals. Plain Python without torch, so it can be tested and drawn alone.

A network of columns is one sequence of states x_0 ... x_{T-1}. With m levels, state t belongs to column t // m and
level t % m (RevCol, ICLR 2023, section 2.1, Eq. 2):

    x_t = F_t(inputs) + gamma_t * x_{t-m}

x_t replaces x_{t-m}, which can be rebuilt from it as long as all inputs of F_t are still available. So a cell may read
only states that have not been replaced: the window x_{t-1} ... x_{t-m+1}, and the stem.

A column may also run from its top level down to level 0, as in RevColV2's decoder (Han, Cai, Zhang, "RevColV2:
Exploring Disentangled Representations in Masked Image Modeling", NeurIPS 2023). Its residuals are the same levels of
the previous column. Where the direction changes, their offsets are 1, 3, 5, ... instead of m.

Other networks are the same sequence with other residuals per level. One long column with x_{t-2} at most levels, and
no residual where the resolution changes, is a RevNet with stages. Without residuals no state is replaced: a cell may
read the whole previous column, as the branches of HRNet do, but no state can be rebuilt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

STEM = -1
"""Index of the stem's output in `Node.reads`."""

READS = ("below", "above", "stem", "top", "full", "before")
"""Named inputs. An integer k, 1 <= k <= m - 1, means the level that runs k positions before this one."""

DIRECTIONS = ("up", "down")
"""`up` runs a column from level 0 to level m - 1, `down` from level m - 1 to level 0."""

ReadToken = str | int


@dataclass(frozen=True, slots=True)
class Node:
    """One cell: its position, its inputs, and the state that it replaces.

    Attributes:
        index: Position t in the sequence.
        column: t // m.
        level: 0 is closest to the image; t % m in a column that runs up.
        reads: Indices of the input states, or `STEM` (-1) for the stem's output.
        residual: Index of the state that it replaces, t - m in RevCol; None if there is none, and then no gain.
        constant: Whether a learned constant is added here. It is a weight of F_t, not a state.
    """

    index: int
    column: int
    level: int
    reads: tuple[int, ...]
    residual: int | None
    constant: bool = False

    def __setstate__(self, state: Sequence[object]) -> None:
        for name, value in zip(Node.__slots__, (*state, False), strict=False):  # older pickles have no `constant`
            object.__setattr__(self, name, value)


@dataclass(frozen=True, slots=True)
class Graph:
    """All nodes of a sequence, in the order in which they run. `revnets.wire` creates it.

    Attributes:
        m: Levels per column.
        nodes: One node per cell.
        window: Number of latest states that cells need, in addition to the stem.
        last: Indices of the states that remain at the end, at most one per level, level 0 first.
    """

    m: int
    nodes: tuple[Node, ...]
    window: int = field(init=False)
    last: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        total, replaced = len(self.nodes), self.replaced
        latest = {node.level: node for node in self.nodes}
        last = sorted(latest.values(), key=lambda node: (node.column, node.level))
        # Fields, because Dynamo cannot trace a cached_property: it takes a lock in Python 3.11.
        object.__setattr__(self, "last", tuple(node.index for node in last if node.index not in replaced))
        needs = ((node.index, need) for node in self.nodes for need in (*node.reads, node.residual))
        distances = [index - need for index, need in needs if need is not None and need != STEM]
        object.__setattr__(self, "window", max([self.m, *distances, total - min(self.last)]))

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.nodes[-1].column + 1

    @property
    def replaced(self) -> set[int]:
        """Indices of the states that a later state replaces."""
        return {node.residual for node in self.nodes if node.residual is not None}

    @property
    def is_invertible(self) -> bool:
        """Whether all states can be rebuilt from the last ones."""
        return len(self.replaced) + len(self.last) == len(self.nodes)

    def is_down(self, column: int) -> bool:
        """Return True if a column runs from its top level down.

        Args:
            column: Index of the column.
        """
        return self.nodes[column * self.m].level > 0

    def states_of(self, column: int) -> range:
        """Return the indices of a column's states, level 0 first in either direction.

        Args:
            column: Index of the column.
        """
        states = range(column * self.m, min((column + 1) * self.m, len(self.nodes)))
        return states[::-1] if self.is_down(column) else states

    def kind(self, node: Node, read: int) -> str:
        """Return where an input comes from: `stem`, `below` (same column) or `above` (an earlier column).

        Args:
            node: The cell that reads it.
            read: Index of the input state, or `STEM`.
        """
        if read == STEM:
            return "stem"
        return "below" if read >= node.column * self.m else "above"

    def name(self, index: int) -> str:
        """Return the name of a state: "c1.l0" for column 1, level 0, or "stem".

        Args:
            index: Index of the state, or `STEM`.
        """
        return "stem" if index == STEM else f"c{self.nodes[index].column}.l{self.nodes[index].level}"

    def table(self) -> list[tuple[str, str, str]]:
        """Return one row (cell, inputs, residual) per cell, as printed by `revnets show`."""
        return [
            (
                self.name(node.index),
                ", ".join([*map(self.name, node.reads), *["constant"] * node.constant]),
                "-" if node.residual is None else self.name(node.residual),
            )
            for node in self.nodes
        ]


class ReadError(ValueError):
    """An argument of `wire` is invalid, such as an input that cells of a level cannot read.

    Not an `ArgumentError`, because importing that class imports torch.

    Attributes:
        key: Name of the argument.
        code: Kind of the error, as in `revnets.engine.errors.ArgumentError`.
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
    """Connect cells into columns of m levels.

    A column that runs down mirrors one that runs up: in both, `below` is the level that ran just before, and `above`
    is the level that runs next, in the previous column. A cell can read the latest state of every level but its own.

    Args:
        length: Number of cells T; the last column may be shorter than m.
        m: Levels per column, at least 2.
        reads: Inputs of each level: names from `revnets.engine.graph.READS`, or offsets k for the level k positions
            earlier in the order of the column.
        residuals: Residual of each level as an offset k, 1 <= k <= m; m is the same level of the previous column, and
            0 means no residual. By default m for all levels.
        directions: `up` or `down` for each column; the first column runs up. By default all columns do.
        constant: Column whose first cell adds a learned constant, such as mask tokens.

    Returns:
        The graph of all cells.

    Raises:
        ReadError: If there are too few levels or cells; an input has an unknown name, an offset outside the window, or
            is a replaced state; or the directions or the constant do not match the columns.

    Example:
        >>> graph = revnets.wire(8, 4, [["below", "above"]] * 4)
        >>> graph.columns, graph.nodes[4].reads
        (2, (-1, 1))
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
    replaced: dict[int, int] = {}  # level that replaced each state
    for t in range(length):
        place = _Place(t, m, directions)
        level = place.level
        step = m if residuals is None else residuals[level]
        residual = place.back(step) if step else None
        if residual is not None:
            if residual in replaced:
                text = f"level {level}: its residual, {step} states back, is already replaced by another level"
                raise ReadError(text, "residuals", code="conflicting-values")
            replaced[residual] = level
        inputs: dict[int, None] = {}  # an ordered set
        for token in reads[level]:
            for read in _resolve(token, place):
                if read in replaced:
                    raise ReadError(
                        f"level {level} reads a state {t - read} back, which is already replaced: it is the residual "
                        f"of level {replaced[read]}. Set that residual to 0 to keep the state",
                        "reads",
                        code="conflicting-values",
                    )
                inputs[read] = None
        # A cell without inputs, such as the first one if no level reads the stem, reads the stem.
        has_constant = place.column == constant and place.position == 0
        nodes.append(Node(t, place.column, level, tuple(inputs) or (STEM,), residual, has_constant))
    return Graph(m, tuple(nodes))


class _Place:
    """Position of cell t: its column, its position in the order of the column, and its level."""

    def __init__(self, t: int, m: int, directions: Sequence[str]):
        self.m = m
        self.directions = directions
        self.column, self.position = divmod(t, m)
        self.is_down = directions[self.column] == "down"
        self.level = _mirrored(self.position, m, self.is_down)

    def back(self, k: int) -> int | None:
        """Return the latest state of the level k positions earlier, 1 <= k <= m; None if there is none yet."""
        before, position = divmod(self.position - k, self.m)
        column = self.column + before
        if column < 0:
            return None
        level = _mirrored(position, self.m, self.is_down)
        return column * self.m + _mirrored(level, self.m, self.directions[column] == "down")


def _mirrored(number: int, m: int, is_down: bool) -> int:
    """Convert a position in a column to the level, or a level to the position."""
    return m - 1 - number if is_down else number


def _check_directions(directions: Sequence[str], columns: int) -> None:
    for direction in directions:
        if direction not in DIRECTIONS:
            text = f"{direction!r} is not a direction; choose {' or '.join(DIRECTIONS)}"
            raise ReadError(text, "directions", code="unknown-choice")
    if len(directions) != columns:
        text = f"{len(directions)} directions for {columns} columns; give one for each"
        raise ReadError(text, "directions", code="wrong-length")
    if directions[0] == "down":
        text = "the first column must run up, because the stem enters at level 0"
        raise ReadError(text, "directions", code="conflicting-values")


def _resolve(token: ReadToken, place: _Place) -> list[int]:
    """Return the indices of the states that an input token selects at a cell; states that do not exist are omitted."""
    m, is_first, is_last = place.m, place.position == 0, place.position == place.m - 1
    offsets: Sequence[int] = ()
    stem: list[int] = []
    if isinstance(token, bool) or not isinstance(token, (str, int)):
        raise ReadError(f"{token!r} is neither an offset nor one of {', '.join(READS)}", "reads", code="wrong-type")
    if isinstance(token, int):
        if not 1 <= token <= m - 1:
            text = f"offset {token} is outside the window: with {m} levels a cell can read x_(t-1) to x_(t-{m - 1})"
            raise ReadError(text, "reads", code="out-of-range")
        offsets = (token,)
    elif token == "below":
        offsets = () if is_first else (1,)
        stem = [STEM] if is_first and not place.is_down else []
    elif token == "above":  # the last level of a column has no next one
        offsets = () if is_last else (m - 1,)
    elif token == "stem":
        stem = [STEM]
    elif token == "top":  # the last level of a column; at that level itself it is the residual
        offsets = () if is_last else (place.position + 1,)
    elif token == "full":
        offsets = range(1, m)
        stem = [STEM] if is_first and not place.is_down else []
    elif token == "before":
        start = place.column * m
        return list(range(start - m, start)) if start else []
    else:
        text = f"{token!r} is not an input; choose {', '.join(READS)}, or an offset from 1 to {m - 1}"
        raise ReadError(text, "reads", code="unknown-choice")
    return stem + [state for state in map(place.back, offsets) if state is not None]
