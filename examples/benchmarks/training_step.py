"""Compare one training step of RevCol-T-shaped columns in all memory modes with checkpointing each column.

    .venv/bin/python examples/benchmarks/training_step.py                    # 8 columns, 128 x 128, batch 8
    .venv/bin/python examples/benchmarks/training_step.py --columns 4,16 --png out/training_step.png

Prints CPU seconds (user and system, medians of interleaved rounds, one thread), their ratio to `store` in the same
round (median and range), bytes saved for backward, peak bytes, and the gradient error against ordinary autograd, all
from one run. `exact, planned` is `exact` with a budget equal to its own peak (docs/guides/memory-planning.md): it
stores what fits below that peak.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from _cli import counts, picture, ratios_by_round
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnets
from revnets.engine.coupling import add
from revnets.engine.graph import STEM
from revnets.memory.tracker import MemoryTracker

SHAPES = {  # channels of level 0 and depths: RevCol, Table 1
    "T": (64, (2, 2, 4, 2)),
    "S": (64, (2, 2, 4, 2)),
    "B": (72, (1, 1, 3, 2)),
}


def columns_net(shape: str, count: int) -> revnets.Net:
    """Build a classifier with columns of one of `SHAPES`."""
    width, depths = SHAPES[shape]
    return revnets.build(
        {
            "columns": count,
            "stem": {"type": "patchify"},
            "levels": [{"dim": width * 2**i, "depth": depth, "block": "convnext"} for i, depth in enumerate(depths)],
            "head": {"type": "classifier", "num_classes": 1000},
        }
    )


class CheckpointedColumns(nn.Module):
    """Baseline: the same cells under ordinary autograd, with `torch.utils.checkpoint` around every column."""

    def __init__(self, columns: revnets.ReversibleColumns):
        super().__init__()
        self.columns = columns

    def forward(self, x: Tensor) -> list[Tensor]:
        graph, states = self.columns.graph, []
        for column, cells in enumerate(self.columns.cells):
            nodes = graph.nodes[column * graph.m : (column + 1) * graph.m]
            states = checkpoint(self._column, nodes, cells, x, *states, use_reentrant=False, preserve_rng_state=True)
        return states

    def _column(self, nodes, cells, x: Tensor, *before: Tensor) -> list[Tensor]:
        states = dict(zip(range(nodes[0].index - len(before), nodes[0].index), before, strict=True))
        for node, cell in zip(nodes, cells, strict=True):
            couple = None if node.residual is None else partial(add, states[node.residual])
            reads = [x if read == STEM else states[read] for read in node.reads]
            states[node.index] = cell(*reads, couple=couple)
        return [states[node.index] for node in nodes]


PLANNED = "exact, planned"


class Contender:
    """One method to train the same weights."""

    def __init__(self, name: str, net: revnets.Net, images: Tensor, labels: Tensor):
        self.name, self.net, self.images, self.labels = name, net, images, labels
        self.columns = CheckpointedColumns(net.columns) if name == "checkpoint" else net.columns
        self.seconds: list[float] = []

    def step(self) -> list[Tensor]:
        loss = self._forward()
        return list(torch.autograd.grad(loss, list(self.net.parameters())))

    def timed(self) -> None:
        start = time.process_time()
        self.step()
        self.seconds.append(time.process_time() - start)

    def memory(self) -> tuple[int, int]:
        """Count the bytes saved for backward, and the peak bytes of a step, gradients included."""
        with MemoryTracker() as tracker:
            loss = self._forward()
            kept = tracker.live
            torch.autograd.grad(loss, list(self.net.parameters()))
        return kept, tracker.peak

    @cached_property
    def plan(self) -> revnets.Plan:
        return revnets.plan(self.net, self.images, optimizer="none", modes=(), budget="exact")

    def _forward(self) -> Tensor:
        if self.name == PLANNED:
            self.plan.apply(self.net)
        elif self.name != "checkpoint":
            self.net.columns.memory, self.net.columns.stored = self.name, 0
        levels = self.columns(self.net.stem(self.images))
        return F.cross_entropy(self.net.head(levels), self.labels)


def main(
    shape: Annotated[str, typer.Option(help=f"Shape of a column, one of {', '.join(SHAPES)}.")] = "T",
    columns: Annotated[str, typer.Option(help="Comma-separated numbers of columns, e.g. 4,8,16.")] = "8",
    size: Annotated[int, typer.Option(help="Side of the images, in pixels.", min=32)] = 128,
    batch: Annotated[int, typer.Option(help="Images per step.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Timed steps of each method.", min=1)] = 5,
    png: Annotated[Path | None, typer.Option(help="Write the figures to this file.", callback=picture)] = None,
    markdown: Annotated[bool, typer.Option(help="Print the tables as Markdown.")] = False,
) -> None:
    """Compare the memory modes on one training step."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", revnets.DriftWarning)  # the table contains the drift of `invert`
    console = Console()
    results = {}
    if shape not in SHAPES:
        raise typer.BadParameter(f"{shape!r}: use {' or '.join(SHAPES)}", param_hint="--shape")
    for count in counts(columns, "--columns", 1):
        results[count] = measure(shape, count, size, batch, rounds)
        title = f"RevCol-{shape} columns: {count}, {size} x {size}, batch {batch}"
        if markdown:
            console.print(as_markdown(title, results[count]), markup=False, highlight=False, soft_wrap=True)
        else:
            console.print(table(title, results[count]))
    console.print(f"torch {torch.__version__}, 1 thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if png is not None:
        draw(results, png)
        console.print(f"wrote {png}", highlight=False, markup=False, soft_wrap=True)


class Result(NamedTuple):
    """Time, memory and gradient error of one step."""

    seconds: list[float]  # one per round
    kept: int
    peak: int
    error: float


def measure(shape: str, count: int, size: int, batch: int, rounds: int) -> dict[str, Result]:
    torch.manual_seed(0)
    net = columns_net(shape, count)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    names = ("store", "recompute", "invert", "exact", PLANNED, "checkpoint")
    contenders = [Contender(name, net, images, labels) for name in names]
    reference = contenders[0].step()
    errors = [error(contender.step(), reference) for contender in contenders]
    memory = [contender.memory() for contender in contenders]
    for _ in track(range(rounds), description=f"{count} columns", transient=True):
        for contender in contenders:
            contender.timed()
    return {each.name: Result(each.seconds, *memory[i], errors[i]) for i, each in enumerate(contenders)}


def error(gradients: list[Tensor], reference: list[Tensor]) -> float:
    """Compute the relative L2 error over all parameters; 0 only if all bits are equal."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(gradients, reference, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in reference)) ** 0.5


COLUMNS = ("mode", "CPU s", "x store", "range", "kept MB", "peak MB", "gradient error")


def row(name: str, result: Result, base: Result) -> tuple[str, ...]:
    ratios = ratios_by_round(result.seconds, base.seconds)
    return (
        name,
        f"{statistics.median(result.seconds):.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        f"{result.kept / 1e6:.1f}",
        f"{result.peak / 1e6:.1f}",
        "bit for bit" if result.error == 0 else f"{result.error:.1e}",
    )


def table(title: str, results: dict[str, Result]) -> Table:
    rows = Table(title=title, title_justify="left")
    for name in COLUMNS:
        rows.add_column(name, justify="left" if name == "mode" else "right")
    for name, result in results.items():
        *cells, verdict = row(name, result, results["store"])
        color = "green" if result.error == 0 else "yellow" if result.error < 0.01 else "red"
        rows.add_row(*cells, f"[{color}]{verdict}")
    return rows


def as_markdown(title: str, results: dict[str, Result]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]
    lines += [f"| {' | '.join(row(name, result, results['store']))} |" for name, result in results.items()]
    return "\n".join([*lines, ""])


def draw(results: dict[int, dict[str, Result]], path: Path) -> None:
    """Plot time, bytes saved for backward and peak bytes against the number of columns."""
    from matplotlib.figure import Figure

    from revnets.plotting.style import save

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    values = {
        "CPU seconds per step": lambda result: statistics.median(result.seconds),
        "saved for backward, MB": lambda result: result.kept / 1e6,
        "peak, MB": lambda result: result.peak / 1e6,
    }
    axes = figure.subplots(1, 3)
    for axis, (title, value) in zip(axes, values.items(), strict=True):
        for name in next(iter(results.values())):
            axis.plot(list(results), [value(result[name]) for result in results.values()], marker="o", label=name)
        axis.set(title=title, xlabel="columns", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


if __name__ == "__main__":
    typer.run(main)
