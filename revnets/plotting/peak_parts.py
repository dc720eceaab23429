"""Figure of a peak memory breakdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revnets.analysis.peak_report import PARTS, MemoryParts
from revnets.plotting.style import INK, unit_of
from revnets.utils.format import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = {  # colors of Okabe and Ito, with shades of one color for related parts
    "weights": "#0072B2",
    "cast weights": "#3C93C4",
    "gradients": "#56B4E9",
    "optimizer": "#A6D5F2",
    "input": "#999999",
    "stem": "#CCCCCC",
    "window": "#009E73",
    "kept states": "#7FCEB9",
    "lost bits": "#F0E442",
    "stored cells": "#E69F00",
    "running cell": "#D55E00",
    "head and loss": "#CC79A7",
}


def peak_figure(result: MemoryParts) -> Figure:
    """Draw the parts of the peak in each memory mode as stacked bars, with percentages from 8 % on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.9 + 0.62 * len(result.modes)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    highest = max(mode.peak for mode in result.modes)
    unit, name = unit_of(highest)
    rows = list(range(len(result.modes)))
    starts = [0.0] * len(rows)
    for part in PARTS:
        lengths = [mode.parts.get(part, 0) / unit for mode in result.modes]
        if any(lengths):
            axes.barh(rows, lengths, left=starts, color=COLORS[part], label=part, height=0.62, edgecolor="white")
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            if length > 0.05 * highest / unit and result.modes[row].share(part) >= 0.08:
                words = f"{result.modes[row].share(part):.0%}"
                axes.text(start + length / 2, row, words, ha="center", va="center", fontsize=8, color=INK)
        starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for row, mode in enumerate(result.modes):
        way = "backward" if mode.is_backward else "forward"
        note = f"{size(mode.peak)}\n{way} of {mode.place}"
        axes.annotate(note, (starts[row], row), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set_yticks(rows, [mode.mode for mode in result.modes])
    axes.invert_yaxis()
    shape = " x ".join(map(str, result.input_shape))
    axes.set_title(f"{result.model}, input {shape}, {result.dtype}, {result.optimizer}", loc="left", fontsize=10)
    axes.set(xlabel=f"{name} at the peak of a training step", xlim=(0, 1.3 * highest / unit))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8.5)
    return figure
