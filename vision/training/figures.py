"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

INK, MUTED, GRID = "#222222", "#8a9099", "#e4e6ea"
BLUE, GREY = "#0072B2", "#9aa1ab"


def training_figure(log: Sequence[dict[str, Any]]) -> Figure:
    """Loss and accuracy of a run, from the lines of its log."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_loss(left, log)
    draw_accuracy(right, log)
    return figure


def draw_loss(axes: Axes, log: Sequence[dict[str, Any]]) -> None:
    """Training and validation loss by epoch."""
    train, val = _of(log, "train"), _of(log, "eval")
    per_epoch = val[-1]["step"] / val[-1]["epoch"] if val else 1
    style(axes, "epoch", "loss")
    axes.plot([line["step"] / per_epoch for line in train], [line["loss"] for line in train], color=GREY, lw=1.2)
    axes.plot([line["epoch"] for line in val], [_counting(line, "loss") for line in val], color=BLUE, lw=2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.legend(axes.lines, ["training, augmented", "validation"], frameon=False, fontsize=9)


def draw_accuracy(axes: Axes, log: Sequence[dict[str, Any]]) -> None:
    """Validation accuracy by epoch, of the weights and of their average."""
    val = _of(log, "eval")
    style(axes, "epoch", "validation top-1, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for name, label, color in (("raw", "weights", GREY), ("ema", "averaged weights", BLUE)):
        points = [(line["epoch"], line[f"{name}_top1"]) for line in val if f"{name}_top1" in line]
        if points:  # a run that was resumed with `ema` has averages from there on
            axes.plot(*zip(*points, strict=True), color=color, lw=2, label=label)
    if val:
        axes.legend(frameon=False, loc="lower right", fontsize=9)
        axes.margins(y=0.1)
        best = max(val, key=lambda line: _counting(line, "top1"))
        point = (best["epoch"], _counting(best, "top1"))
        axes.plot(*point, "o", color=BLUE, markersize=5)
        late = best["epoch"] > val[-1]["epoch"] / 2
        axes.annotate(
            f"best {point[1]:.2f} %",
            point,
            (5 if late else -5, 8),  # above, where no curve is
            textcoords="offset points",
            ha="right" if late else "left",
            va="bottom",
            color=INK,
            fontsize=9.5,
        )


def confusion_figure(confusion: Tensor, classes: Sequence[str]) -> Figure:
    """Which class is taken for which. At most 30 classes get their names.

    Args:
        confusion: (true class, predicted class), counts.
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
    """Quiet axes: no box, light lines, small labels."""
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
    """Of the averaged weights if there are any."""
    return line.get(f"ema_{key}", line[f"raw_{key}"])
