"""Draw the figure of the README: activation memory and gradient error against the number of columns.

    .venv/bin/python examples/benchmarks/overview.py --png docs/assets/overview.png

Measures one training step of RevCol-T-shaped columns per mode, with the models and counters of `training_step.py` and
without timing: about three minutes on one core, and 4 GB of memory for `store` at 32 columns.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import torch
import typer
from _cli import counts, picture
from rich.console import Console
from rich.progress import track
from rich.table import Table
from training_step import Contender, columns_net, error

import revnets

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Style(NamedTuple):
    """How a mode is drawn."""

    label: str
    color: str
    marker: str
    linewidth: float = 1.8


STYLES = {
    "store": Style("store (ordinary backprop)", "#767676", "o"),
    "checkpoint": Style("torch.utils.checkpoint", "#E69F00", "s"),
    "invert": Style("invert (plain inversion)", "#D55E00", "^"),
    "exact": Style("exact (default)", "#009E73", "D", 2.6),
}


class Measurement(NamedTuple):
    """One mode at one number of columns."""

    kept: int  # bytes saved for backward
    peak: int  # bytes
    error: float  # relative L2 error of all gradients, 0 if every bit is the same


Measurements = dict[int, dict[str, Measurement]]


def main(
    columns: Annotated[str, typer.Option(help="Comma-separated numbers of columns, e.g. 4,8,16.")] = "2,4,8,16,32",
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.", min=32)] = 128,
    batch: Annotated[int, typer.Option(help="Images per step.", min=1)] = 8,
    png: Annotated[Path | None, typer.Option(help="Write the figure to this file.", callback=picture)] = None,
) -> None:
    """Measure activation memory and gradient error of four ways to train the same weights."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", revnets.DriftWarning)  # the figure shows this drift
    console = Console()
    numbers = counts(columns, "--columns", 1)
    results = {count: measure(count, size, batch) for count in track(numbers, "measuring", transient=True)}
    console.print(table(results))
    if png is not None:
        draw(results, png, f"One training step of RevCol-T columns, {size} x {size}, batch {batch}, float32, CPU")
        console.print(f"wrote {png}", highlight=False, markup=False, soft_wrap=True)


def measure(count: int, size: int, batch: int) -> dict[str, Measurement]:
    """Measure all modes at one number of columns, with the same weights and the same batch."""
    torch.manual_seed(0)
    net = columns_net("T", count)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    contenders = {name: Contender(name, net, images, labels) for name in STYLES}
    reference = contenders["store"].step()
    return {
        name: Measurement(*contender.memory(), 0.0 if name == "store" else error(contender.step(), reference))
        for name, contender in contenders.items()
    }


def table(results: Measurements) -> Table:
    """Return the numbers of the figure, and the peaks."""
    rows = Table(title="One training step", title_justify="left")
    for name in ("columns", "mode", "saved for backward, MB", "peak, MB", "gradient error"):
        rows.add_column(name, justify="left" if name == "mode" else "right")
    for count, modes in results.items():
        for name, one in modes.items():
            verdict = "bit for bit" if one.error == 0 else f"{one.error:.1e}"
            rows.add_row(f"{count}", name, f"{one.kept / 1e6:.1f}", f"{one.peak / 1e6:.1f}", verdict)
    return rows


def draw(results: Measurements, path: Path, subtitle: str) -> None:
    """Plot memory on the left and gradient error on the right."""
    from matplotlib.figure import Figure

    from revnets.plotting.style import INK, save

    figure = Figure(figsize=(10, 3.9), layout="constrained")
    memory, gradients = figure.subplots(1, 2)
    draw_memory(memory, results)
    draw_errors(gradients, results)
    for axis in (memory, gradients):
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(results), [str(count) for count in results])
        axis.xaxis.minorticks_off()
        axis.set_xlabel("columns")
        axis.grid(alpha=0.25, axis="y")
        axis.spines[["top", "right"]].set_visible(False)
    memory.set_title("Activation memory saved for backward", loc="left", color=INK)
    gradients.set_title("Gradient error", loc="left", color=INK)
    handles, names = memory.get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9)
    legend.set_title(subtitle, prop={"size": 8})
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def draw_memory(axis: Axes, results: Measurements) -> None:
    """Plot bytes saved for backward; the last point of each mode is labeled."""
    last = max(results)
    for name, style in STYLES.items():
        values = [results[count][name].kept / 1e6 for count in results]
        axis.plot(list(results), values, marker=style.marker, color=style.color, lw=style.linewidth, label=style.label)
        kept = results[last][name].kept / 1e6
        text = f" {kept / 1e3:.1f} GB" if kept >= 1e3 else f" {kept:.0f} MB"
        axis.text(last * 1.06, kept, text, color=style.color, va="center", fontsize=9)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g} MB")
    axis.yaxis.minorticks_off()
    axis.set_xlim(0.85 * min(results), 1.8 * last)


def draw_errors(axis: Axes, results: Measurements) -> None:
    """Plot the error of plain inversion, and one line at zero for the modes with correct gradients."""
    numbers = list(results)
    style = STYLES["invert"]
    errors = [100 * results[count]["invert"].error for count in numbers]
    axis.plot(numbers, errors, marker=style.marker, color=style.color, lw=style.linewidth)
    for count, value in zip(numbers, errors, strict=True):
        if value >= 1:
            axis.annotate(
                f"{value:.0f} %", (count, value), (-8, 4), textcoords="offset points", color=style.color, ha="right"
            )
    right = [name for name in STYLES if all(results[count][name].error == 0 for count in numbers)]
    for name in right:
        axis.plot(
            numbers, [0] * len(numbers), marker=STYLES[name].marker, color=STYLES[name].color, lw=STYLES[name].linewidth
        )
    text = "all others:\n0, bit for bit" if len(right) == len(STYLES) - 1 else f"{', '.join(right)}: 0, bit for bit"
    color = STYLES["exact"].color
    axis.annotate(text, (numbers[0], 0), (0, 10), textcoords="offset points", fontsize=9, color=color)
    axis.yaxis.set_major_formatter("{x:g} %")
    axis.set_ylim(top=max(*errors, 1.0) * 1.2)


if __name__ == "__main__":
    typer.run(main)
