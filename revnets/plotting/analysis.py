"""Figures of `revnets analyze memory` and `revnets analyze gains`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from revnets.analysis.gains import Bits, CellGains
from revnets.analysis.memory_scaling import Point
from revnets.plotting.style import INK, MODE_COLORS, unit_of, whole_numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORDS = {
    "store": "store: ordinary autograd",
    "recompute": "recompute: states of all columns",
    "invert": "invert: nothing (drifts)",
    "exact": "exact: lost bits",
}
MARKERS = {"store": "o", "recompute": "^", "invert": "v", "exact": "s"}
LEVELS = ("#56B4E9", "#0072B2", "#E69F00", "#D55E00", "#CC79A7", "#009E73", "#000000", "#999999")
"""Colors of levels, from Okabe and Ito. They repeat from the ninth level on."""


def memory_figure(large: Sequence[Point], small: Sequence[Point], measured: Sequence[Point]) -> Figure:
    """Draw memory against the number of columns (figure 4 of the paper).

    Args:
        large: Predictions for a large training step.
        small: Predictions for a small training step, drawn as lines.
        measured: Measurements of the small step, drawn as markers.
    """
    from matplotlib.lines import Line2D

    figure = _blank(8.6, 3.5)
    left, right = figure.subplots(1, 2)
    _draw_memory(left, large, large)
    _draw_memory(right, small, measured)
    left.set_title(f"(a) predicted: {large[0].words}", fontsize=9, loc="left", color=INK)
    right.set_title(f"(b) measured (markers): {small[0].words}", fontsize=9, loc="left", color=INK)
    modes = dict.fromkeys(point.mode for point in large)
    colors = [Line2D([], [], color=MODE_COLORS[mode], marker=MARKERS[mode], label=WORDS[mode]) for mode in modes]
    words: dict[str, Any] = {"peak": "-", "saved for backward": "--", "weights and gradients": ":"}
    lines = [Line2D([], [], color=INK, linestyle=style, label=word) for word, style in words.items()]
    nothing = Line2D([], [], linestyle="", label=" ")
    handles = [handle for pair in zip_longest(colors, lines, fillvalue=nothing) for handle in pair]  # column by column
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) // 2, frameon=False, fontsize=8.5)
    return figure


def _draw_memory(axes: Axes, lines: Sequence[Point], markers: Sequence[Point]) -> None:
    """Draw predictions as lines and measurements as markers."""
    unit, name = unit_of(max(point.peak for point in [*lines, *markers]))
    for mode in dict.fromkeys(point.mode for point in lines):
        for field, style, face in (("peak", "-", MODE_COLORS[mode]), ("kept", "--", "white")):
            look = {"color": MODE_COLORS[mode], "markerfacecolor": face, "markersize": 5}
            for points, marker, line in ((lines, "", style), (markers, MARKERS[mode], "")):
                of_mode = [point for point in points if point.mode == mode]
                values = [getattr(point, field) / unit for point in of_mode]
                axes.plot([point.columns for point in of_mode], values, marker=marker, linestyle=line, **look)
    first = [point for point in lines if point.mode == lines[0].mode]
    weights = [2 * point.parameters / unit for point in first]
    axes.plot([point.columns for point in first], weights, color=INK, linestyle=":", linewidth=1)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xticks(sorted({point.columns for point in [*lines, *markers]}))
    _quiet(axes, "columns", name)


def gains_figure(cells: Sequence[CellGains], bits: Sequence[Bits]) -> Figure:
    """Draw the distribution of |gamma| in every column, and the lost bits per element that it costs.

    Args:
        cells: Gains of the cells of a model.
        bits: Lost bits of each cell.
    """
    figure = _blank(8.0, 5.2)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _draw_gamma(top, cells)
    _draw_bits(bottom, cells, bits)
    bottom.set_xlim(min(cell.column for cell in cells) - 0.6, max(cell.column for cell in cells) + 0.6)
    whole_numbers(bottom)
    return figure


def _draw_gamma(axes: Axes, cells: Sequence[CellGains]) -> None:
    columns = sorted({cell.column for cell in cells})
    gamma = {column: torch.cat([cell.gamma for cell in cells if cell.column == column]).numpy() for column in columns}
    low, high = min(values.min() for values in gamma.values()), max(values.max() for values in gamma.values())
    is_wide = high > 20 * low
    shown = {column: np.log10(values) if is_wide else values for column, values in gamma.items()}
    bodies = axes.violinplot(list(shown.values()), columns, widths=0.8, showextrema=False, points=200)["bodies"]
    for body in bodies:  # type: ignore[union-attr]
        body.set(facecolor="#b9c4d0", edgecolor="none", alpha=0.7)
    for column, values in shown.items():
        lower, middle, upper = np.quantile(values, (0.25, 0.5, 0.75))
        axes.vlines(column, lower, upper, color=INK, linewidth=4)
        axes.plot(column, middle, "o", color="white", markeredgecolor=INK, markersize=5, zorder=4)
    levels = sorted({cell.level for cell in cells})
    for cell in cells:
        at = float(cell.gamma.median())
        place = cell.column + 0.32 * (2 * (levels.index(cell.level) + 0.5) / len(levels) - 1)
        color = LEVELS[cell.level % len(LEVELS)]
        label = f"median, level {cell.level}" if cell.column == columns[0] else None
        axes.plot(place, np.log10(at) if is_wide else at, "D", color=color, markersize=3.5, label=label, zorder=3)
    if is_wide:
        decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
        axes.set_yticks(list(decades), [f"$10^{{{decade}}}$" for decade in decades])
    else:
        axes.set_ylim(bottom=0)
    _quiet(axes, "", r"$|\gamma|$")
    axes.legend(fontsize=8.5, frameon=False, ncols=len(levels), loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)


def _draw_bits(axes: Axes, cells: Sequence[CellGains], bits: Sequence[Bits]) -> None:
    for level in sorted({cell.level for cell in cells}):
        points = [(cell.column, found) for cell, found in zip(cells, bits, strict=True) if cell.level == level]
        columns, color = [column for column, _ in points], LEVELS[level % len(LEVELS)]
        axes.plot(columns, [found.kept for _, found in points], "D-", color=color, markersize=3.5)
        axes.plot(columns, [found.entropy for _, found in points], ":", color=color)
    axes.plot([], [], "D-", color=INK, markersize=3.5, label="saved by exact")
    axes.plot([], [], ":", color=INK, label="entropy (lower bound)")
    axes.set_ylim(0, 1.12 * max(found.kept for found in bits))
    _quiet(axes, "column", "lost bits per element")
    axes.legend(fontsize=8.5, frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.98), borderpad=0)


def _blank(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _quiet(axes: Axes, x: str, y: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
