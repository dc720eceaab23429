"""Figures of a run: training curves and confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

if TYPE_CHECKING:
    from vision.tasks.base import Curve

INK, MUTED, GRID = "#222222", "#8a9099", "#e4e6ea"
BLUE, GRAY = "#0072B2", "#9aa1ab"


def training_figure(log: Sequence[dict[str, Any]], curves: Sequence[Curve]) -> Figure:
    """A figure of the loss of a run and the metrics of its task, from the records of its log."""
    figure = Figure(figsize=(4.5 * (1 + len(curves)), 3.6), layout="constrained")
    left, *others = figure.subplots(1, 1 + len(curves), squeeze=False)[0]
    draw_loss(left, log)
    for axes, curve in zip(others, curves, strict=True):
        draw_metric(axes, log, curve)
    return figure


def draw_loss(axes: Axes, log: Sequence[dict[str, Any]]) -> None:
    """Plot the training loss by epoch, and the validation loss if the task has one."""
    train, val = _of(log, "train"), _of(log, "eval")
    per_epoch = val[-1]["step"] / val[-1]["epoch"] if val else 1
    style(axes, "epoch", "loss")
    axes.plot([line["step"] / per_epoch for line in train], [line["loss"] for line in train], color=GRAY, lw=1.2)
    with_loss = [line for line in val if "raw_loss" in line]
    points = [_counting(line, "loss") for line in with_loss]
    axes.plot([line["epoch"] for line in with_loss], points, color=BLUE, lw=2)
    if min([*points, *(line["loss"] for line in train)], default=0) >= 0:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.legend(axes.lines, ["training, augmented", "validation"], frameon=False, fontsize=9)


def draw_metric(axes: Axes, log: Sequence[dict[str, Any]], curve: Curve) -> None:
    """Plot a validation metric by epoch, of the weights and of their average, with a mark at the best value."""
    val = [line for line in _of(log, "eval") if f"raw_{curve.metric}" in line]
    style(axes, "epoch", curve.axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for name, label, color in (("raw", "weights", GRAY), ("ema", "averaged weights", BLUE)):
        key = f"{name}_{curve.metric}"
        points = [(line["epoch"], line[key]) for line in val if key in line]
        if points:  # a run that was resumed with `ema` has no averages before
            axes.plot(*zip(*points, strict=True), color=color, lw=2, label=label)
    if val:
        is_max = curve.mode == "max"
        axes.legend(frameon=False, loc="lower right" if is_max else "upper right", fontsize=9)
        axes.margins(y=0.1)
        best = (max if is_max else min)(val, key=lambda line: _counting(line, curve.metric))
        point = (best["epoch"], _counting(best, curve.metric))
        axes.plot(*point, "o", color=BLUE, markersize=5)
        late = best["epoch"] > val[-1]["epoch"] / 2
        axes.annotate(
            f"best {curve.text(point[1])}",
            point,
            (5 if late else -5, 8 if is_max else -8),  # outside of the curve
            textcoords="offset points",
            ha="right" if late else "left",
            va="bottom" if is_max else "top",
            color=INK,
            fontsize=9.5,
        )


def confusion_figure(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """A figure of the confusion matrix, with class names for at most 30 classes.

    Args:
        confusion: Counts (true class, predicted class).
        classes: Names of the classes.
    """
    side = min(12.0, 3 + 0.3 * len(classes))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shares = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    if len(classes) <= 30:
        axes.set_xticks(range(len(classes)), classes)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in confusion.nonzero().tolist():
            color = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, str(int(confusion[row, column])), ha="center", va="center", color=color, fontsize=8)
    return figure


def style(axes: Axes, x: str, y: str) -> None:
    """Style axes without a box, with light lines and small labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)


def _of(log: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in log if line["kind"] == kind]


def _counting(line: dict[str, Any], key: str) -> float:
    """The metric of the averaged weights if there are any, else of the weights."""
    return line.get(f"ema_{key}", line[f"raw_{key}"])
