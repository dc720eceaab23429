"""The picture of a run of `gpu.py`: one panel for each section."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from revnets.plotting.style import INK, MODE_COLORS
from revnets.utils.format import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    **MODE_COLORS,
    "budget: exact": "#0072B2",
    "official scheme": "#CC79A7",
    "checkpoint columns": "#E69F00",
    "selective": "#F0E442",
}


def gpu_figure(found: dict[str, Any]) -> Figure:
    """Draw what `Run.to_dict` gives."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 9), layout="constrained", facecolor="white")
    panels = figure.subplots(2, 2)
    draws = {"checks": _draw_checks, "plan": _draw_plan, "figure4": _draw_figure, "steps": _draw_steps}
    for axes, (section, draw) in zip(panels.flat, draws.items(), strict=True):
        rows = [row for row in found["sections"].get(section, []) if row["status"] == "ok"]
        if rows:
            draw(axes, rows)
            axes.spines[["top", "right"]].set_visible(False)
        else:
            axes.text(0.5, 0.5, f"{section}: not measured", ha="center", transform=axes.transAxes, color=INK)
            axes.set_axis_off()
    words = f"{found['device']['words']}, torch {found['torch']}, {found['seconds']:.0f} s"
    figure.suptitle(words, fontsize=11, color=INK)
    return figure


def _draw_checks(axes: Axes, rows: list[dict[str, Any]]) -> None:
    modes = list(rows[0]["modes"])
    for y, row in enumerate(rows):
        for x, mode in enumerate(modes):
            one = row["modes"][mode]
            color = "#009E73" if one["equal"] else "#D55E00" if one["right"] is False else "#F0E442"
            words = "bit for bit" if one["equal"] else f"{float(one['error']):.0e}"
            axes.barh(y, 0.94, left=x - 0.47, height=0.86, color=color)
            axes.text(x, y, words, ha="center", va="center", fontsize=8, color=INK)
    axes.set_xticks(range(len(modes)), modes)
    axes.set_yticks(range(len(rows)), [row["check"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title("gradients against those of store", loc="left", fontsize=10)


def _draw_plan(axes: Axes, rows: list[dict[str, Any]]) -> None:
    modes = list(rows[0]["modes"])
    for offset, mode in enumerate(modes):
        errors = [100 * row["modes"][mode]["error"] for row in rows]
        places = [index + (offset - (len(modes) - 1) / 2) * 0.38 for index in range(len(rows))]
        axes.barh(places, errors, height=0.36, color=COLORS[mode], label=mode)
        for place, error, row in zip(places, errors, rows, strict=True):
            words = f"{error:+.1f} % of {size(row['modes'][mode]['measured'])}"
            side = {"ha": "left" if error >= 0 else "right", "va": "center", "fontsize": 7.5, "color": INK}
            axes.annotate(words, (error, place), (3 if error >= 0 else -3, 0), textcoords="offset points", **side)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["model"] for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    reach = 2.5 * max(2.0, *(abs(100 * row["modes"][mode]["error"]) for row in rows for mode in modes))
    axes.set(xlim=(-reach, reach), xlabel="predicted peak against the measured one, %")
    axes.set_title("revnets.plan", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _draw_figure(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = [(row["columns"], row["peak"] / 2**30) for row in rows if row["mode"] == mode]
        axes.plot(*zip(*points, strict=True), "o-", color=COLORS[mode], label=mode)
    axes.set(xlabel="columns", ylabel="peak GiB, weights included", ylim=(0, None))
    axes.set_xticks(sorted({row["columns"] for row in rows}))
    row = rows[0]
    title = f"columns of RevCol-T, batch {row['batch']}, {row['size']} x {row['size']}, float32"
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _draw_steps(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Time against peak; a line joins the ways of one net and batch."""
    nets = dict.fromkeys((row["size"], row["batch"]) for row in rows)
    markers = dict(zip(nets, "osD^vPX*", strict=False))
    for net, marker in markers.items():
        points = sorted(
            (row["peak"] / 2**30, row["milliseconds"] / row["batch"], row["way"]) for row in rows if _net(row) == net
        )
        axes.plot([x for x, *_ in points], [y for _, y, _ in points], "-", color="#CCCCCC", linewidth=0.8, zorder=1)
        for x, y, way in points:
            axes.plot(x, y, marker, color=COLORS[way], markersize=7, markeredgecolor=INK, markeredgewidth=0.4)
    for way in dict.fromkeys(row["way"] for row in rows):
        axes.plot([], [], "o", color=COLORS[way], label=way)
    for (letter, batch), marker in markers.items():
        axes.plot([], [], marker, color="#FFFFFF", markeredgecolor=INK, label=f"{letter}, batch {batch}")
    axes.set(xlabel="peak GiB, weights included", ylabel="milliseconds an image", xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.set_title("training steps under bfloat16", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=7.5, bbox_to_anchor=(1.0, 1.0), loc="upper left")


def _net(row: dict[str, Any]) -> tuple[str, int]:
    return row["size"], row["batch"]
