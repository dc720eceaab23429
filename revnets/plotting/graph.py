"""A graph as a picture: columns from left to right, levels from bottom to top, wires by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from revnets.engine.errors import ArgumentError
from revnets.engine.graph import STEM, Graph, Node
from revnets.plotting.style import INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind people can tell apart.
WIRES = {
    "below": ("#0072B2", "reads a lower level"),
    "above": ("#D55E00", "reads a higher level, one column before"),
    "before": ("#CC79A7", "reads the same or a lower level, one column before"),
    "gain": ("#009E73", r"adds $\gamma$ times the state one column before"),
    "skip": ("#E69F00", r"adds $\gamma$ times a state of its own column"),
    "stem": ("#767676", "reads the stem"),
}

MOST_COLUMNS = 12
"""More columns than this are drawn as the first `HEAD`, an ellipsis and the last `TAIL`."""
HEAD, TAIL = 5, 3
MOST_LABELLED = 4
"""Up to so many columns have the labels in every box; with more, they stand once at the left."""

FONT_SIZE = 8.0  # points
LINE, MARGIN, LEVEL_GAP, STEM_HEIGHT = 0.15, 0.2, 0.42, 0.3  # inches, as all lengths here
HEADER, LEGEND_LINE, LEGEND_SAMPLE, STEM_LANE = 0.3, 0.22, 0.34, 0.17


def graph_figure(graph: Graph, labels: Sequence[str] | None = None) -> Figure:
    """Draw columns, levels and wires.

    Args:
        graph: what to draw.
        labels: of each level, level 0 first, such as `64 x 56 x 56`; may have several lines.

    Raises:
        ArgumentError: the number of labels is not that of the levels.
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
    _draw_boxes(axes, layout)
    _draw_legend(axes, layout)
    return figure


# ------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class _Layout:
    """Where everything stands, in inches from the lower left corner."""

    graph: Graph
    labels: Sequence[str]
    labelled: bool  # are the labels in the boxes?
    columns: dict[int, float]  # centres of the columns that are drawn
    hidden: range  # columns that the ellipsis stands for
    ellipsis: float  # its centre
    box: tuple[float, float]  # width and height
    text: float  # width of the widest label
    legend: list[list[str]]  # rows of kinds of wires
    width: float
    height: float

    @property
    def stem(self) -> float:
        return MARGIN + len(self.legend) * LEGEND_LINE + 0.12 + STEM_HEIGHT / 2

    def level(self, level: int) -> float:
        height = self.box[1]
        return self.stem + STEM_HEIGHT / 2 + LEVEL_GAP + height / 2 + level * (height + LEVEL_GAP)

    def place(self, index: int) -> tuple[float, float, float] | None:
        """Left and right edge and centre line of a state's box, or of the ellipsis if it is one of its two ends."""
        column, level = divmod(index, self.graph.m)
        y = self.level(level)
        if column in self.columns:
            x, half = self.columns[column], self.box[0] / 2
        elif column in (self.hidden.start, self.hidden.stop - 1):
            x, half = self.ellipsis, 0.16
        else:
            return None
        return x - half, x + half, y


def _layout(graph: Graph, labels: Sequence[str] | None) -> _Layout:
    hidden = range(HEAD, graph.columns - TAIL) if graph.columns > MOST_COLUMNS else range(0)
    shown = [column for column in range(graph.columns) if column not in hidden]
    labelled = labels is not None and len(shown) <= MOST_LABELLED
    names = labels or [f"level {level}" for level in range(graph.m)]
    text = max(_text_width(line) for name in names for line in name.splitlines())
    lines = max(len(name.splitlines()) for name in names)
    x = MARGIN if labelled else MARGIN + text + 0.15
    if any(_residual_kind(graph, node) == "skip" for node in graph.nodes if node.residual is not None):
        x += _bulge(max(node.index - node.residual for node in graph.nodes if node.residual is not None))
    if any(STEM in node.reads and node.level for node in graph.nodes):
        x += STEM_LANE
    # Wires from far above or below need room to fan out.
    wires = [(node, read) for node in graph.nodes for read in node.reads if read != STEM]
    reach = max((abs(read % graph.m - node.level) for node, read in wires), default=1)
    around = max((node.level - read % graph.m for node, read in wires if graph.kind(node, read) == "below"), default=1)
    box = (max(0.6, text + 0.24) if labelled else 0.6, max(0.35 + 0.05 * reach, lines * LINE + 0.16))
    gap = 0.55 + 0.15 * reach
    columns, ellipsis = {}, 0.0
    for column in shown:
        columns[column] = x + box[0] / 2
        x += box[0] + gap
        if hidden and column == hidden.start - 1:
            ellipsis = x + 0.16
            x += 0.32 + gap
    width = x - gap + MARGIN + (0.75 * _bulge(around) if around > 1 else 0)
    kinds = {_kind(graph, node, read) for node in graph.nodes for read in node.reads}
    kinds |= {_residual_kind(graph, node) for node in graph.nodes if node.residual is not None}
    legend = _flow([kind for kind in WIRES if kind in kinds], max(width, 3.4) - 2 * MARGIN)
    width = max([width, *(2 * MARGIN + sum(map(_legend_width, row)) for row in legend)])
    layout = _Layout(graph, names, labelled, columns, hidden, ellipsis, box, text, legend, width, height=0.0)
    return replace(layout, height=layout.level(graph.m - 1) + box[1] / 2 + HEADER + MARGIN / 2)


def _kind(graph: Graph, node: Node, read: int) -> str:
    """Of the wire that a read is."""
    kind = graph.kind(node, read)
    return "before" if kind == "above" and read % graph.m <= node.level else kind


def _residual_kind(graph: Graph, node: Node) -> str:
    assert node.residual is not None
    return "skip" if node.residual // graph.m == node.column else "gain"


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
    """The wires into one cell; those that come from or go to hidden columns end at the ellipsis and are paler."""
    target = layout.place(node.index)
    if target is None or node.column == layout.hidden.stop - 1:
        return
    graph, height = layout.graph, layout.box[1]
    left, right, y = target
    above = sorted(read for read in node.reads if read != STEM and graph.kind(node, read) == "above")
    for rank, read in enumerate(above):  # the higher its source, the higher a wire arrives
        source = layout.place(read)
        if source is not None:
            port = y + height * (0.08 + 0.4 * (rank + 1) / (len(above) + 1))
            kind, start = _kind(graph, node, read), (source[1], source[2] - 0.3 * height)
            _arrow(axes, kind, start, (left, port), pale=_pale(layout, read, node))
    if node.residual is not None and (source := layout.place(node.residual)) is not None:
        if _residual_kind(graph, node) == "gain":
            _arrow(axes, "gain", (source[1], source[2]), (left, y), pale=_pale(layout, node.residual, node))
        elif node.column in layout.columns:  # around the boxes between, on the other side than reads
            start, end, out = source[2] + 0.2 * height, y - 0.1 * height, left - _bulge(node.index - node.residual)
            _arrow(axes, "skip", (left, start), (out, start), (out, end), (left, end))
    if node.column not in layout.columns:
        return
    for read in node.reads:
        if read == STEM or graph.kind(node, read) != "below":
            continue
        distance = node.level - read % graph.m
        source_y = layout.level(read % graph.m)
        if distance == 1:
            middle = (left + right) / 2
            _arrow(axes, "below", (middle, source_y + height / 2), (middle, y - height / 2))
        else:  # around the boxes between
            start, end, out = source_y + 0.36 * height, y + 0.2 * height, right + _bulge(distance)
            _arrow(axes, "below", (right, start), (out, start), (out, end), (right, end))


def _bulge(distance: int) -> float:
    """How far the control points of a wire lie from the boxes that it goes around."""
    return 0.16 + 0.2 * (distance - 1)


def _pale(layout: _Layout, read: int, node: Node) -> bool:
    return read // layout.graph.m in layout.hidden or node.column in layout.hidden


def _arrow(axes: Axes, kind: str, *points: tuple[float, float], pale: bool = False) -> None:
    """A straight wire through two points, or a cubic curve with four control points."""
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
    """The stem below the first column, a line along the bottom, and a branch to every cell that reads it."""
    readers = [(n, place) for n in layout.graph.nodes if STEM in n.reads and (place := layout.place(n.index))]
    readers = [(n, place) for n, place in readers if n.column in layout.columns]
    if not readers:
        return
    colour, y, height = WIRES["stem"][0], layout.stem, layout.box[1]
    ends = []
    for node, (left, right, middle) in readers:
        if node.level == 0:
            x = (left + right) / 2
            _arrow(axes, "stem", (x, y), (x, middle - height / 2))
        else:
            x, port = left - STEM_LANE, middle - 0.32 * height
            axes.plot([x, x], [y, port], color=colour, linewidth=1.1, solid_capstyle="butt")
            _arrow(axes, "stem", (x, port), (left, port))
        ends.append(x)
    first = layout.columns[0]
    axes.plot([min(first, *ends), max(first, *ends)], [y, y], color=colour, linewidth=1.1, solid_capstyle="projecting")
    _box(axes, first, y, 0.6, STEM_HEIGHT, "stem", "#E6E6E6")


def _draw_boxes(axes: Axes, layout: _Layout) -> None:
    graph, (width, height) = layout.graph, layout.box
    last_level = (len(graph.nodes) - 1) % graph.m
    for column, x in layout.columns.items():
        top = last_level if column == graph.columns - 1 else graph.m - 1
        for level in range(top + 1):
            text = layout.labels[level] if layout.labelled else rf"$x_{{{column * graph.m + level}}}$"
            _box(axes, x, layout.level(level), width, height, text, _tint(level, graph.m), math=not layout.labelled)
        _text(axes, x, layout.level(graph.m - 1) + height / 2 + 0.12, f"column {column}", va="bottom")
    for level in range(graph.m):
        if layout.hidden:
            _text(axes, layout.ellipsis, layout.level(level), "• • •", color=WIRES["stem"][0])
        if not layout.labelled:
            edge = MARGIN + layout.text
            _text(axes, edge, layout.level(level), layout.labels[level], ha="right")


def _tint(level: int, levels: int) -> tuple[float, float, float]:
    """Deeper with the level, from near white to a pale blue."""
    share = level / (levels - 1)
    return (0.96 - 0.18 * share, 0.97 - 0.11 * share, 0.985 - 0.04 * share)


def _box(axes: Axes, x: float, y: float, width: float, height: float, text: str, colour, math: bool = False) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.07"
    axes.add_patch(
        FancyBboxPatch(corner, width, height, style, facecolor=colour, edgecolor=INK, linewidth=0.8, zorder=3)
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
