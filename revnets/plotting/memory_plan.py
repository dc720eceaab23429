"""Figure of a memory plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from revnets.memory.planner import Plan, Prediction
from revnets.utils.format import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = {  # colors of Okabe and Ito
    "parameters": "#0072B2",
    "gradients": "#56B4E9",
    "optimizer": "#CC79A7",
    "communication": "#999999",
    "activations": "#E69F00",
}


def parts_of(prediction: Prediction) -> dict[str, int]:
    """Return the peak in parts. What is not static counts as activations.

    Backward allocates gradients while it frees activations, so gradients may only exist in part at the peak.
    """
    found = {
        "parameters": prediction.parameters,
        "gradients": prediction.gradients,
        "optimizer": prediction.optimizer,
        "communication": prediction.buckets,
    }
    rest = prediction.peak - sum(found.values())
    if rest < 0:  # at the peak, some gradients do not exist yet
        found["gradients"] += rest
    return {**found, "activations": max(rest, 0)}


def plan_figure(plan: Plan) -> Figure:
    """Draw the parts of the peak of each mode as stacked bars. A line marks the budget."""
    from matplotlib.figure import Figure

    rows = [*plan.modes, plan.chosen] if plan.chosen and plan.chosen not in plan.modes else list(plan.modes)
    names = [row.name.replace(", ", "\n") for row in rows]
    figure = Figure(figsize=(8, 1.1 + 0.55 * len(rows)), layout="constrained", facecolor="white")
    axes = figure.subplots()
    starts = [0.0] * len(rows)
    for part, color in PARTS.items():
        lengths = [parts_of(row)[part] / 2**30 for row in rows]
        if any(lengths):
            axes.barh(names, lengths, left=starts, color=color, label=part, height=0.62)
            starts = [start + length for start, length in zip(starts, lengths, strict=True)]
    for name, row, end in zip(names, rows, starts, strict=True):
        axes.annotate(size(row.peak), (end, name), (4, 0), textcoords="offset points", va="center", fontsize=9)
    if plan.budget is not None:
        axes.axvline(plan.budget / 2**30, color="#D55E00", linestyle="--", linewidth=1.2, label="budget")
    axes.invert_yaxis()
    axes.set(xlabel="GiB at the peak", xlim=(0, 1.18 * max([*starts, (plan.budget or 0) / 2**30])))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=6, frameon=False, fontsize=9)
    return figure
