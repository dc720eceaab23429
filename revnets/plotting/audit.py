"""Figure of an audit.

Figures are drawn without pyplot, so they depend neither on a display nor on global state. matplotlib is imported with
the first figure. Colors are those of Okabe and Ito, which color-blind people can distinguish.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING

from revnets.analysis.audit_report import Audit, ModeAudit
from revnets.engine.drift import INVERT_LIMIT
from revnets.plotting.graph import graph_figure as graph_figure
from revnets.plotting.style import INK, MODE_COLORS, unit_of, whole_numbers
from revnets.utils.format import duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def audit_figure(audit: Audit) -> Figure:
    """Draw an audit: errors of the rebuilt states and of the gradients, and memory by column and by mode."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(10, 6.6), layout=layout, facecolor="white")
    panels = figure.subplots(2, 2)
    draws = (_draw_states, _draw_gradients, _draw_growth, _draw_bytes)
    for axes, draw in zip(panels.flat, draws, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9, colors=INK)
        draw(axes, audit)
        axes.title.set(fontsize=11, ha="left", x=0.0, color=INK)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set(fontsize=9.5, color=INK)
    return figure


def _draw_states(axes: Axes, audit: Audit) -> None:
    axes.set_title("States rebuilt from the last column")
    if not audit.columns:
        _nothing(axes, audit.nothing_rebuilt)
        return
    color, columns = MODE_COLORS["invert"], [column.column for column in audit.columns]
    errors = [column.invert_error for column in audit.columns]
    top = _logarithmic(axes, "y", [*errors, *(error for column in audit.columns for error in column.invert_levels)])
    for level in range(audit.m):
        points = [
            (c.column, _shown(c.invert_levels[level], top)) for c in audit.columns if level < len(c.invert_levels)
        ]
        axes.plot(*zip(*points, strict=True), color=color, alpha=0.35, linewidth=1)
    shown = [_shown(error, top) for error in errors]
    axes.plot(columns, shown, "o-", color=color, markersize=4, label="invert (thin: each level)", clip_on=False)
    for exact, marker, shade, label in (
        (True, "s", MODE_COLORS["exact"], "exact: equal bit for bit"),
        (False, "X", "black", "exact: DIFFERS"),
    ):
        at = [column.column for column in audit.columns if column.exact is exact]
        if at:
            axes.plot(at, [0] * len(at), marker, color=shade, markersize=5, label=label, clip_on=False, zorder=3)
    axes.axhline(INVERT_LIMIT, color=INK, linestyle=":", linewidth=1)
    axes.set(xlabel="column", ylabel="relative error (dotted: 1 %)", xlim=(-0.5, columns[-1] + 0.5))
    whole_numbers(axes)
    axes.legend(fontsize=9, frameon=False)


def _draw_gradients(axes: Axes, audit: Audit) -> None:
    axes.set_title("Gradients compared with store")
    modes = [mode for mode in audit.modes if mode.mode != "store"]
    if not modes:
        _nothing(axes, "only store was measured")
        return
    top = _logarithmic(axes, "x", [mode.gradient_error for mode in modes])
    _bars(axes, [mode.mode for mode in modes], [_shown(mode.gradient_error, top) for mode in modes])
    for row, mode in enumerate(modes):
        _note(axes, row, _gradient_words(audit, mode))
    axes.axvline(INVERT_LIMIT, color=INK, linestyle=":", linewidth=1)
    axes.set_xlabel("relative error (dotted: 1 %)")


def _gradient_words(audit: Audit, mode: ModeAudit) -> str:
    if mode.failure:
        return "failed"
    if mode.equal:
        return "equal bit for bit"
    error = f"error {mode.gradient_error:.1e}" if math.isfinite(mode.gradient_error) else "not finite"
    return f"{error}: WRONG" if audit.verdict(mode) == "wrong" else error


def _draw_growth(axes: Axes, audit: Audit) -> None:
    axes.set_title("Memory during the forward pass of the columns")
    if not audit.modes:
        _nothing(axes, "no mode was measured")
        return
    unit, name = unit_of(max(sum(mode.column_bytes) for mode in audit.modes))
    for mode in audit.modes:
        alive = [total / unit for total in accumulate(mode.column_bytes)]
        slope = "" if math.isnan(mode.bytes_per_column) else f": {size(mode.bytes_per_column)}"
        style = {"color": MODE_COLORS[mode.mode], "markersize": 3.5, "label": mode.mode + slope}
        axes.plot(range(len(alive)), alive, "o-", **style)
    most = max(sum(mode.column_bytes) for mode in audit.modes) / unit
    last = max(len(mode.column_bytes) for mode in audit.modes) - 1
    axes.set(xlabel="after column", ylabel=f"{name} alive", xlim=(-0.5, last + 0.5), ylim=(0, 1.4 * most or 1))
    whole_numbers(axes)
    title = "per additional column" if last else None
    axes.legend(  # above the curves
        fontsize=9, frameon=False, ncols=2, loc="upper left", title=title, title_fontsize=9, alignment="left"
    )


def _draw_bytes(axes: Axes, audit: Audit) -> None:
    axes.set_title("Memory saved for backward, and peak")
    if not audit.modes:
        _nothing(axes, "no mode was measured")
        return
    unit, name = unit_of(max(mode.peak_bytes for mode in audit.modes))
    names = [mode.mode for mode in audit.modes]
    _bars(axes, names, [mode.peak_bytes / unit for mode in audit.modes], alpha=0.3)
    _bars(axes, names, [mode.kept_bytes / unit for mode in audit.modes])
    for row, mode in enumerate(audit.modes):
        step = "" if math.isnan(mode.seconds) else f", step time {duration(mode.seconds)}"
        _note(axes, row, f"saved {size(mode.kept_bytes)}, peak {size(mode.peak_bytes)}{step}")
    axes.set_xlabel(f"{name} (dark: saved for backward, light: peak)")


def _bars(axes: Axes, modes: list[str], lengths: list[float], alpha: float = 1.0) -> None:
    axes.barh(range(len(modes)), lengths, height=0.36, color=[MODE_COLORS[mode] for mode in modes], alpha=alpha)
    axes.set_yticks(range(len(modes)), modes)
    axes.set_ylim(len(modes) - 0.6, -0.6)  # the first on top


def _note(axes: Axes, row: int, text: str) -> None:
    """Write a text above a bar."""
    axes.annotate(text, (0, row - 0.3), (3, 0), textcoords="offset points", va="center", fontsize=9, color=INK)


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=10, color=INK)
    axes.set(xticks=[], yticks=[])


def _logarithmic(axes: Axes, which: str, errors: list[float]) -> float:
    """Set up a logarithmic axis of errors that includes 0; return the largest value on it."""
    found = [error for error in errors if error > 0 and math.isfinite(error)]
    lowest = 10.0 ** math.floor(math.log10(min([*found, 1e-6])))
    top = 10.0 ** math.ceil(math.log10(max([*found, INVERT_LIMIT])) + 0.5)
    decades = range(round(math.log10(lowest)), round(math.log10(top)) + 1)
    step = 1 + len(decades) // 7
    ticks = [0.0, *(10.0**decade for decade in decades[::step])]
    set_scale, axis = (axes.set_yscale, axes.yaxis) if which == "y" else (axes.set_xscale, axes.xaxis)
    set_scale("symlog", linthresh=lowest, linscale=max(0.6, 0.08 * len(decades)))  # space from 0 to the first
    (axes.set_ylim if which == "y" else axes.set_xlim)(0, top)
    axis.set_ticks(ticks)
    axis.set_ticks([], minor=True)
    return top


def _shown(error: float, top: float) -> float:
    """Clip an error to the axis. Values that are not finite are drawn at its end."""
    return min(error, top) if math.isfinite(error) else top
