"""Compare RevCol with one column of the same blocks on Fashion-MNIST, with a small fixed budget and three seeds.

    apt-get install dataset-fashion-mnist         # Debian and Ubuntu; or any directory with the four idx files: --root
    python examples/experiments/fashion_mnist.py                    # 10 to 12 minutes on 2 CPU cores
    python examples/experiments/fashion_mnist.py --seeds 1 epochs=2 --output runs/quick

Trains with `revnets train fashion`, two concurrent runs with one thread each: RevCol, RevCol with intermediate
supervision, and a ConvNeXt of one column and equal size, all with the same settings. Running the command again resumes
stopped runs. The output is in runs/fashion.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from seed_runner import (
    PLAIN,
    REPO,
    ROOT,
    Run,
    Size,
    compare,
    planned,
    require_equal,
    require_files,
    run_as_script,
    size_of,
    spread,
)

from revnets.plotting.style import save
from vision.data.dataset import load_data
from vision.training.figures import INK, style

OUTPUT = Path(os.path.relpath(REPO / "runs" / "fashion"))

BUDGET = ("epochs=5", "data.train_samples=16000", "batch_size=64", "schedule.warmup_epochs=0.5", "log_every=25", *PLAIN)
"""Overrides of the recipe `fashion` for all runs: 1250 updates of 64 images."""

WIDTHS = "timm: test_revcol, dims: [16, 32, 64, 128]"
REVCOL = f"model={{{WIDTHS}, columns: 4, depths: [1, 1, 1, 1]}}"
MODELS = {
    "ConvNeXt": (
        f"model={{{WIDTHS}, columns: 1, depths: [4, 5, 5, 5]}}",
    ),  # deeper, to compensate for the fusions of RevCol
    "RevCol": (REVCOL,),
    "RevCol, supervised": (REVCOL, "supervision={}"),  # with the weights of the paper
}
COLORS = dict(zip(MODELS, ("#D55E00", "#0072B2", "#009E73"), strict=True))
EQUAL = 0.02
"""Maximum relative difference in parameters and multiply-accumulates of the models."""


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides for all runs, key.path=value: epochs=10", show_default=False)
    ] = None,
    root: Annotated[Path, typer.Option(help="Directory with the four idx files, gzipped or not.")] = ROOT,
    output: Annotated[Path, typer.Option(help="Directory of all runs.")] = OUTPUT,
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each model.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="Number of concurrent runs, with one thread each.")] = 2,
) -> None:
    """Train RevCol, with and without supervision, and a ConvNeXt of equal size on Fashion-MNIST, and compare."""
    console = Console()
    require_files(root)
    runs = [
        planned(MODELS, name, seed, [*BUDGET, f"data.root={root.resolve()}", *(overrides or [])], output)
        for seed in range(seeds)
        for name in MODELS
    ]
    data = load_data(runs[0].config.data, seed=0)
    sizes = {run.model: size_of(run.config, data) for run in runs}
    require_equal(sizes, parameters=EQUAL, macs=EQUAL)
    compare(runs, data, jobs, output, console)
    console.print(summary(runs, sizes))
    picture = output / "fashion.png"
    save(figure(runs), picture)
    console.print(f"figure {picture}", highlight=False, markup=False, soft_wrap=True)


def summary(runs: Sequence[Run], sizes: Mapping[str, Size]) -> Table:
    """Return the size and the results of each model as a table."""
    title = f"Fashion-MNIST, {runs[0].config.epochs} epochs, {len(runs) // len(sizes)} runs each"
    table = Table(title=title, title_justify="left")
    for heading in ("", "parameters", "with heads", "MACs", "test accuracy", "CPU minutes"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, size in sizes.items():
        of_model = [run for run in runs if run.model == name]
        table.add_row(
            name,
            f"{size.parameters:,}",
            f"{size.with_heads:,}",
            f"{size.macs:,}",
            f"[bold]{spread([run.curve()[1][-1] for run in of_model], 2)} %[/bold]",
            spread([run.state()["cpu_seconds"] / 60 for run in of_model], 1),
        )
    table.caption = "mean ± standard deviation over seeds, after the last epoch; minutes per run"
    return table


def figure(runs: Sequence[Run]) -> Figure:
    """Plot accuracy by epoch of every seed (thin) and their mean, and the final accuracy of each seed."""
    found = Figure(figsize=(11, 4), layout="constrained", facecolor="white")
    curves, ends = found.subplots(1, 2, width_ratios=(1.6, 1))
    style(curves, "epoch", "test accuracy, %")
    style(ends, "", "test accuracy, %")
    for place, name in enumerate(MODELS):
        color, of_model = COLORS[name], [run.curve() for run in runs if run.model == name]
        epochs = of_model[0][0]
        for _, accuracy in of_model:
            curves.plot(epochs, accuracy, color=color, lw=0.8, alpha=0.4)
        means = [statistics.mean(values) for values in zip(*(accuracy for _, accuracy in of_model), strict=True)]
        curves.plot(epochs, means, "o-", color=color, lw=2, markersize=4, label=name)
        last = [accuracy[-1] for _, accuracy in of_model]
        ends.plot([place] * len(last), last, "o", color=color, markersize=5, alpha=0.7)
        ends.plot([place - 0.18, place + 0.18], [means[-1]] * 2, color=color, lw=2)
        ends.annotate(
            f"{means[-1]:.2f}", (place + 0.22, means[-1]), va="center", color=color, fontsize=9.5, fontweight="bold"
        )
    curves.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    curves.legend(frameon=False, loc="lower right", fontsize=9.5, labelcolor="linecolor")
    curves.set_title("Accuracy by epoch: every seed, and their mean", loc="left", color=INK, fontsize=11)
    ends.set_title("After the last epoch", loc="left", color=INK, fontsize=11)
    ends.set_xticks(range(len(MODELS)), [name.replace(", ", ",\n") for name in MODELS])
    ends.set_xlim(-0.4, len(MODELS) - 0.3)
    return found


if __name__ == "__main__":
    run_as_script(main)
