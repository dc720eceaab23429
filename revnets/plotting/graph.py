"""Figure of a graph: columns from left to right, levels from bottom to top, and connections colored by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING

from revnets.engine.errors import ArgumentError
from revnets.engine.graph import STEM, Graph, Node
from revnets.plotting.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colors of Okabe and Ito, which color-blind people can distinguish.
WIRES = {
    "below": ("#0072B2", "input: lower level, same column"),
    "down": ("#56B4E9", "input: higher level, same column"),
    "above": ("#D55E00", "input: higher level, previous column"),
    "before": ("#CC79A7", "input: same or lower level, previous column"),
    "gain": ("#009E73", r"adds $\gamma$ times the state of the previous column"),
    "skip": ("#E69F00", r"adds $\gamma$ times a state of the same column"),
    "stem": ("#767676", "input: stem"),
    "constant": ("#000000", "adds a learned constant"),
}

MOST_COLUMNS = 12
"""If there are more columns than this, only the first `HEAD` and the last `TAIL` are drawn, with an ellipsis."""
HEAD, TAIL = 5, 3
HEAD_OF_RUN, TAIL_OF_RUN = 3, 2
"""The same for each run of columns in one direction, if the direction changes."""
MOST_LABELED = 4
"""Up to this number of columns, every box contains its label. With more columns, labels are on the left."""

FONT_SIZE = 8.0  # points
LINE, MARGIN, LEVEL_GAP, STEM_HEIGHT = 0.15, 0.2, 0.42, 0.3  # inches, as all lengths here
HEADER, LEGEND_LINE, LEGEND_SAMPLE, STEM_LANE = 0.3, 0.22, 0.34, 0.17


def graph_figure(graph: Graph, labels: Sequence[str] | None = None) -> Figure:
    """Draw columns, levels and connections of a graph.

    Args:
        graph: The graph.
        labels: One label per level, level 0 first, such as `64 x 56 x 56`. May contain several lines.

    Raises:
        ArgumentError: If the number of labels differs from the number of levels.
    """
    from matplotlib.figure import Figure

    if labels is not None and len(labels) != graph.m:
        raise ArgumentError(
            f"{len(labels)} labels for {graph.m} levels; give one per level", "labels", code="wrong-length"
        )
    layout = _layout(graph, labels)
    figure = Figure(figsize=(layout.width, layout.height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, layout.width), ylim=(0, layout.height))  # one unit is one inch
    axes.axis("off")
    for node in graph.nodes:
        _draw_wires(axes, layout, node)
    _draw_stem(axes, layout)
    _draw_constant(axes, layout)
    _draw_boxes(axes, layout)
    _draw_legend(axes, layout)
    return figure


# ------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class _Layout:
    """Positions in inches from the lower left corner."""

    graph: Graph
    labels: Sequence[str]
    labeled: bool  # whether labels are in the boxes
    columns: dict[int, float]  # centers of the columns that are drawn
    hidden: dict[range, float]  # columns that an ellipsis replaces, and its center
    box: tuple[float, float]  # width and height
    text: float  # width of the widest label
    legend: list[list[str]]  # rows of kinds of connections
    width: float
    height: float

    @property
    def stem(self) -> float:
        return MARGIN + len(self.legend) * LEGEND_LINE + 0.12 + STEM_HEIGHT / 2

    @property
    def top(self) -> float:
        """Upper edge of the boxes and of the constant that enters from above."""
        enters = any(node.constant and node.level for node in self.graph.nodes)
        return self.level(self.graph.m - 1) + self.box[1] / 2 + enters * (LEVEL_GAP + STEM_HEIGHT)

    def level(self, level: int) -> float:
        height = self.box[1]
        return self.stem + STEM_HEIGHT / 2 + LEVEL_GAP + height / 2 + level * (height + LEVEL_GAP)

    def place(self, index: int) -> tuple[float, float, float] | None:
        """Return left edge, right edge and center line of the box of a state, or of an ellipsis that it borders."""
        column, y = self.graph.nodes[index].column, self.level(self.graph.nodes[index].level)
        half = self.box[0] / 2
        if (x := self.columns.get(column)) is None:
            half = 0.16
            x = next((x for hidden, x in self.hidden.items() if column in (hidden.start, hidden.stop - 1)), None)
        return None if x is None else (x - half, x + half, y)


def _hidden(graph: Graph) -> list[range]:
    """Return the omitted columns if there are many: equal ones in the middle of a run of one direction."""
    whole = range(HEAD, graph.columns - TAIL)
    if graph.columns <= MOST_COLUMNS:
        return []
    runs = [list(run) for _, run in groupby(range(graph.columns), graph.is_down)]
    hidden = [range(run[0] + HEAD_OF_RUN, run[-1] + 1 - TAIL_OF_RUN) for run in runs if len(run) > MOST_COLUMNS // 2]
    few = len(runs) > 1 and graph.columns - sum(map(len, hidden)) <= 2 * MOST_COLUMNS
    return hidden if few else [whole]


def _layout(graph: Graph, labels: Sequence[str] | None) -> _Layout:
    ranges = _hidden(graph)
    shown = [column for column in range(graph.columns) if not any(column in hidden for hidden in ranges)]
    labeled = labels is not None and len(shown) <= MOST_LABELED
    names = labels or [f"level {level}" for level in range(graph.m)]
    text = max(_text_width(line) for name in names for line in name.splitlines())
    lines = max(len(name.splitlines()) for name in names)
    x = MARGIN if labeled else MARGIN + text + 0.15
    residuals = [(node, node.residual) for node in graph.nodes if node.residual is not None]
    if skips := [node.index - residual for node, residual in residuals if graph.kind(node, residual) == "below"]:
        x += _bulge(max(skips))
    if any(STEM in node.reads and node.level for node in graph.nodes):
        x += STEM_LANE
    # Connections from far above or below need space to fan out.
    wires = [(node, read) for node in graph.nodes for read in node.reads if read != STEM]
    reach = max((abs(graph.nodes[read].level - node.level) for node, read in wires), default=1)
    around = max((abs(_distance(graph, node, read)) for node, read in wires), default=1)
    box = (max(0.6, text + 0.24) if labeled else 0.6, max(0.35 + 0.05 * reach, lines * LINE + 0.16))
    gap = 0.55 + 0.15 * reach
    columns, ellipses = {}, {}
    for column in shown:
        columns[column] = x + box[0] / 2
        x += box[0] + gap
        for hidden in (hidden for hidden in ranges if column == hidden.start - 1):
            ellipses[hidden] = x + 0.16
            x += 0.32 + gap
    width = x - gap + MARGIN + (0.75 * _bulge(around) if around > 1 else 0)
    kinds = {_kind(graph, node, read) for node in graph.nodes for read in node.reads}
    kinds |= {_residual_kind(graph, node) for node, _ in residuals}
    kinds |= {"constant" for node in graph.nodes if node.constant}
    legend = _flow([kind for kind in WIRES if kind in kinds], max(width, 3.4) - 2 * MARGIN)
    width = max([width, *(2 * MARGIN + sum(map(_legend_width, row)) for row in legend)])
    layout = _Layout(graph, names, labeled, columns, ellipses, box, text, legend, width, height=0.0)
    return replace(layout, height=layout.top + HEADER + MARGIN / 2)


def _kind(graph: Graph, node: Node, read: int) -> str:
    """Return the kind of the connection to an input."""
    kind = graph.kind(node, read)
    if kind == "above":
        return "above" if graph.nodes[read].level > node.level else "before"
    return "down" if kind == "below" and graph.nodes[read].level > node.level else kind


def _distance(graph: Graph, node: Node, read: int) -> int:
    """Return how many levels an input of the same column is below a cell, or 0 for other inputs."""
    return node.level - graph.nodes[read].level if graph.kind(node, read) == "below" else 0


def _residual_kind(graph: Graph, node: Node) -> str:
    assert node.residual is not None
    return "skip" if graph.kind(node, node.residual) == "below" else "gain"


@cache
def _text_width(text: str) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, prop=FontProperties(size=FONT_SIZE)).get_extents().width / 72 if text.strip() else 0.0


def _legend_width(kind: str) -> float:
    return LEGEND_SAMPLE + 0.08 + _text_width(WIRES[kind][1]) + 0.25


def _flow(kinds: list[str], width: float) -> list[list[str]]:
    """Break the legend into rows that fit."""
    rows: list[list[str]] = [[]]
    for kind in kinds:
        if rows[-1] and sum(map(_legend_width, [*rows[-1], kind])) > width:
            rows.append([])
        rows[-1].append(kind)
    return rows


# ------------------------------------------------------------------------------------------------------------ drawing


def _draw_wires(axes: Axes, layout: _Layout, node: Node) -> None:
    """Draw the connections into one cell. Those of hidden columns end at the ellipsis and are paler."""
    target = layout.place(node.index)
    if target is None or any(node.column == hidden.stop - 1 for hidden in layout.hidden):
        return
    graph, height = layout.graph, layout.box[1]
    left, right, y = target
    side = -1 if graph.is_down(node.column) else 1  # side of the center line where the previous column arrives
    before = [read for read in node.reads if read != STEM and graph.kind(node, read) == "above"]
    before.sort(key=lambda read: side * graph.nodes[read].level)
    for rank, read in enumerate(before):  # connections from farther away arrive farther from the center
        source = layout.place(read)
        if source is not None:
            port = y + side * height * (0.08 + 0.4 * (rank + 1) / (len(before) + 1))
            kind, start = _kind(graph, node, read), (source[1], source[2] - side * 0.3 * height)
            _arrow(axes, kind, start, (left, port), pale=_pale(layout, read, node))
    if node.residual is not None and (source := layout.place(node.residual)) is not None:
        if _residual_kind(graph, node) == "gain":
            _arrow(axes, "gain", (source[1], source[2]), (left, y), pale=_pale(layout, node.residual, node))
        elif node.column in layout.columns:  # around the boxes in between, opposite to the inputs
            start, end, out = source[2] + 0.2 * height, y - 0.1 * height, left - _bulge(node.index - node.residual)
            _arrow(axes, "skip", (left, start), (out, start), (out, end), (left, end))
    if node.column not in layout.columns:
        return
    for read in node.reads:
        if read == STEM or graph.kind(node, read) != "below":
            continue
        kind, distance = _kind(graph, node, read), abs(_distance(graph, node, read))
        source_y = layout.level(graph.nodes[read].level)
        if distance == 1:
            middle = (left + right) / 2
            _arrow(axes, kind, (middle, source_y + side * height / 2), (middle, y - side * height / 2))
        else:  # around the boxes in between
            start, end, out = source_y + side * 0.36 * height, y + side * 0.2 * height, right + _bulge(distance)
            _arrow(axes, kind, (right, start), (out, start), (out, end), (right, end))


def _bulge(distance: int) -> float:
    """Return the distance of the control points of a connection from the boxes that it goes around."""
    return 0.16 + 0.2 * (distance - 1)


def _pale(layout: _Layout, read: int, node: Node) -> bool:
    return not {layout.graph.nodes[read].column, node.column} <= layout.columns.keys()


def _arrow(axes: Axes, kind: str, *points: tuple[float, float], pale: bool = False) -> None:
    """Draw a straight connection between two points, or a cubic curve with four control points."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    codes = [Path.MOVETO, *[Path.LINETO if len(points) == 2 else Path.CURVE4] * (len(points) - 1)]
    red, green, blue = (channel + (1 - channel) * (0.6 if pale else 0.0) for channel in to_rgb(WIRES[kind][0]))
    axes.add_patch(
        FancyArrowPatch(
            path=Path(points, codes),
            arrowstyle="-|>,head_length=4,head_width=1.8",
            mutation_scale=1,
            color=(red, green, blue),
            linewidth=1.8 if kind in ("gain", "skip") else 1.1,
            joinstyle="miter",
        )
    )


def _draw_stem(axes: Axes, layout: _Layout) -> None:
    """Draw the stem below the first column, a line along the bottom, and a branch to every cell with that input."""
    readers = [(n, place) for n in layout.graph.nodes if STEM in n.reads and (place := layout.place(n.index))]
    readers = [(n, place) for n, place in readers if n.column in layout.columns]
    if not readers:
        return
    color, y, height = WIRES["stem"][0], layout.stem, layout.box[1]
    ends = []
    for node, (left, right, middle) in readers:
        if node.level == 0:
            x = (left + right) / 2
            _arrow(axes, "stem", (x, y), (x, middle - height / 2))
        else:
            x, port = left - STEM_LANE, middle - 0.32 * height
            axes.plot([x, x], [y, port], color=color, linewidth=1.1, solid_capstyle="butt")
            _arrow(axes, "stem", (x, port), (left, port))
        ends.append(x)
    first = layout.columns[0]
    axes.plot([min(first, *ends), max(first, *ends)], [y, y], color=color, linewidth=1.1, solid_capstyle="projecting")
    _box(axes, first, y, 0.6, STEM_HEIGHT, "stem", "#E6E6E6")


def _draw_constant(axes: Axes, layout: _Layout) -> None:
    """Draw a constant above or below the cell where it enters, next to the connections that arrive there."""
    for node, (left, right, y) in ((n, place) for n in layout.graph.nodes if (place := layout.place(n.index))):
        if node.constant and node.column in layout.columns:
            side, height = (1 if node.level else -1), layout.box[1]
            x, end = (left + right) / 2 + 0.18 * (side < 0), y + side * height / 2
            start = end + side * LEVEL_GAP if node.level else layout.stem
            _box(axes, x, start + side * STEM_HEIGHT / 2, 0.64, STEM_HEIGHT, "constant", "#FFFFFF")
            _arrow(axes, "constant", (x, start), (x, end))


def _draw_boxes(axes: Axes, layout: _Layout) -> None:
    graph, (width, height) = layout.graph, layout.box
    for column, x in layout.columns.items():
        for index in graph.states_of(column):
            level = graph.nodes[index].level
            text = layout.labels[level] if layout.labeled else rf"$x_{{{index}}}$"
            _box(axes, x, layout.level(level), width, height, text, _tint(level, graph.m), math=not layout.labeled)
        _text(axes, x, layout.top + 0.12, f"column {column}", va="bottom")
    for level in range(graph.m):
        for x in layout.hidden.values():
            _text(axes, x, layout.level(level), "• • •", color=WIRES["stem"][0])
        if not layout.labeled:
            edge = MARGIN + layout.text
            _text(axes, edge, layout.level(level), layout.labels[level], ha="right")


def _tint(level: int, levels: int) -> tuple[float, float, float]:
    """Return the color of a level, from near white to a pale blue."""
    share = level / (levels - 1)
    return (0.96 - 0.18 * share, 0.97 - 0.11 * share, 0.985 - 0.04 * share)


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color, math: bool = False) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.07"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, style, facecolor=color, edgecolor=INK, linewidth=0.8, zorder=3)
    )
    _text(axes, x, y, text, math=math)


def _text(axes: Axes, x: float, y: float, text: str, math: bool = False, **options) -> None:
    options = {"ha": "center", "va": "center", "color": INK, **options}
    axes.text(x, y, text, fontsize=FONT_SIZE, linespacing=1.15, parse_math=math, zorder=4, **options)


def _draw_legend(axes: Axes, layout: _Layout) -> None:
    for row, kinds in enumerate(reversed(layout.legend)):
        x, y = MARGIN, MARGIN + row * LEGEND_LINE
        for kind in kinds:
            _arrow(axes, kind, (x, y), (x + LEGEND_SAMPLE, y))
            _text(axes, x + LEGEND_SAMPLE + 0.08, y - 0.038, WIRES[kind][1], math=True, ha="left", va="baseline")
            x += _legend_width(kind)
