"""Small versions of the paper's ablations (Tables 5 to 7) on Fashion-MNIST: three seeds, equal multiply-accumulates.

    apt-get install dataset-fashion-mnist         # Debian and Ubuntu; or any directory with the four idx files: --root
    python examples/experiments/ablations.py                  # everything: 12 minutes of one CPU core
    python examples/experiments/ablations.py --tables 7 --seeds 1 --epochs 1 --output runs/quick

Table 5 divides one network into 1, 2, 4 or 8 columns. Table 6 compares RevCol with fully connected branches without
reversible connections, as in HRNet, and with one column of RevNet connections. Table 7 is RevCol with and without
intermediate supervision. Models in two tables are trained once. Running the command again resumes stopped runs. The
output is in runs/ablations.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
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
from vision.errors import TrainingError
from vision.paths import CONFIGS
from vision.training.figures import INK, style

OUTPUT = Path(os.path.relpath(REPO / "runs" / "ablations"))
BUDGET = ("data.train_samples=8000", "batch_size=64", "schedule.warmup_epochs=0.3", "log_every=25", *PLAIN)
"""Overrides of the recipe `fashion` for all runs: 125 updates of 64 images per epoch."""

MEMORY = "memory=store"  # all modes have equal gradients, and this one is the fastest for small networks


def columns(count: int, dims: Sequence[int], depths: Sequence[int]) -> str:
    """Return the override for a RevCol of any shape."""
    return f"model={{timm: test_revcol, columns: {count}, dims: {list(dims)}, depths: {list(depths)}}}"


REVCOL = columns(4, (16, 32, 64, 128), (1, 1, 1, 1))
MODELS = {
    "1 column": (columns(1, (24, 48, 96, 192), (2, 2, 2, 2)),),
    "2 columns": (columns(2, (16, 32, 64, 128), (1, 2, 4, 2)),),
    "RevCol": (REVCOL,),
    "8 columns": (columns(8, (12, 20, 48, 88), (1, 1, 1, 1)),),
    "multi-branch": (f"model={CONFIGS / 'ablations' / 'fashion_multi_branch.yaml'}",),
    "RevNet": (f"model={CONFIGS / 'ablations' / 'fashion_revnet.yaml'}",),
    "RevCol, supervised": (REVCOL, "supervision={}"),  # with the weights of the paper
}


class Ablation(NamedTuple):
    """A table of the paper."""

    title: str
    models: tuple[str, ...]


TABLES = {
    "5": Ablation("Columns", ("1 column", "2 columns", "RevCol", "8 columns")),
    "6": Ablation("Connections", ("multi-branch", "RevNet", "RevCol")),
    "7": Ablation("Supervision", ("RevCol", "RevCol, supervised")),
}
COLORS = {"RevCol": "#0072B2", "RevCol, supervised": "#009E73", "multi-branch": "#D55E00", "RevNet": "#CC79A7"}
EQUAL = {"parameters": 0.06, "macs": 0.02}
"""Maximum relative difference between the models of a table."""


def main(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides for all runs, key.path=value: optimizer.lr=2e-3", show_default=False),
    ] = None,
    tables: Annotated[str, typer.Option(help="Comma-separated tables, of 5, 6 and 7.")] = "5,6,7",
    seeds: Annotated[int, typer.Option(min=1, help="Number of runs of each model.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Number of epochs.")] = 2,
    root: Annotated[Path, typer.Option(help="Directory with the four idx files, gzipped or not.")] = ROOT,
    output: Annotated[Path, typer.Option(help="Directory of all runs.")] = OUTPUT,
    jobs: Annotated[int, typer.Option(min=1, help="Number of concurrent runs, with one thread each.")] = 1,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
) -> None:
    """Train small versions of the paper's ablations, Tables 5 to 7, on Fashion-MNIST, and compare them."""
    console = Console(stderr=markdown)
    chosen = choose(tables)
    require_files(root)
    words = [*BUDGET, f"epochs={epochs}", MEMORY, f"data.root={root.resolve()}", *(overrides or [])]
    names = list(dict.fromkeys(name for ablation in chosen.values() for name in ablation.models))
    runs = [planned(MODELS, name, seed, words, output) for seed in range(seeds) for name in names]
    data = load_data(runs[0].config.data, seed=0)
    sizes = {run.model: size_of(run.config, data) for run in runs}
    for ablation in chosen.values():
        require_equal({name: sizes[name] for name in ablation.models}, **EQUAL)
    compare(runs, data, jobs, output, console)
    if markdown:
        print("\n".join(in_markdown(chosen, runs, sizes)))
    else:
        console.print(summary(chosen, runs, sizes))
    picture = output / "ablations.png"
    save(figure(chosen, runs), picture)
    console.print(f"figure {picture}", highlight=False, markup=False, soft_wrap=True)


def choose(tables: str) -> dict[str, Ablation]:
    """Return the tables with the given numbers, such as `5,7`.

    Raises:
        TrainingError: If there is no such table.
    """
    numbers = [number.strip() for number in tables.split(",") if number.strip()]
    unknown = [number for number in numbers if number not in TABLES]
    if unknown or not numbers:
        raise TrainingError(
            f"--tables {tables!r}: choose from {', '.join(TABLES)}, as in --tables 5,7", code="unknown-choice"
        )
    return {number: TABLES[number] for number in TABLES if number in numbers}


def rows(ablation: Ablation, runs: Sequence[Run], sizes: Mapping[str, Size]) -> list[tuple[str, ...]]:
    """Return name, parameters, multiply-accumulates, accuracy and CPU minutes of each model."""
    found = []
    for name in ablation.models:
        of_model = [run for run in runs if run.model == name]
        found.append(
            (
                name,
                f"{sizes[name].parameters:,}",
                f"{sizes[name].macs:,}",
                spread(accuracies(of_model), 2),
                spread([run.state()["cpu_seconds"] / 60 for run in of_model], 1),
            )
        )
    return found


def accuracies(runs: Sequence[Run]) -> list[float]:
    """Return the accuracy of each run after the last epoch, in percent."""
    return [run.curve()[1][-1] for run in runs]


HEADINGS = ("parameters", "MACs", "accuracy, %", "CPU minutes")


def summary(chosen: Mapping[str, Ablation], runs: Sequence[Run], sizes: Mapping[str, Size]) -> Table:
    """Return all tables as one, for a terminal."""
    seeds = len({run.seed for run in runs})
    table = Table(title=f"Fashion-MNIST, {runs[0].config.epochs} epochs, {seeds} runs each", title_justify="left")
    for heading in ("table", "model", *HEADINGS):
        table.add_column(heading, justify="left" if heading in ("table", "model") else "right")
    for number, ablation in chosen.items():
        for index, row in enumerate(rows(ablation, runs, sizes)):
            end = index == len(ablation.models) - 1
            table.add_row("" if index else number, *row, end_section=end)
    table.caption = "mean ± standard deviation over seeds, all test images, after the last epoch; minutes per run"
    return table


def in_markdown(chosen: Mapping[str, Ablation], runs: Sequence[Run], sizes: Mapping[str, Size]) -> list[str]:
    """Return all tables as the lines of one Markdown table."""
    lines = [f"| table | model | {' | '.join(HEADINGS)} |", "| --- | --- |" + " --- |" * len(HEADINGS)]
    for number, ablation in chosen.items():
        lines += [f"| {number} | {' | '.join(row)} |" for row in rows(ablation, runs, sizes)]
    return lines


def figure(chosen: Mapping[str, Ablation], runs: Sequence[Run]) -> Figure:
    """Plot one panel per table: the accuracy of each seed (dots) and their mean."""
    found = Figure(figsize=(3.2 + 2.9 * len(chosen), 4), layout="constrained", facecolor="white")
    widths = [len(ablation.models) + 0.6 for ablation in chosen.values()]
    panels = found.subplots(1, len(chosen), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, (number, ablation) in zip(panels, chosen.items(), strict=True):
        _panel(axes, f"Table {number}: {ablation.title.lower()}", ablation, runs)
    panels[0].set_ylabel("test accuracy, %")
    return found


def _panel(axes: Axes, title: str, ablation: Ablation, runs: Sequence[Run]) -> None:
    style(axes, "", "")
    for place, name in enumerate(ablation.models):
        last = accuracies([run for run in runs if run.model == name])
        mean, color = statistics.mean(last), COLORS.get(name, "#767676")
        axes.plot([place] * len(last), last, "o", color=color, markersize=5, alpha=0.7)
        axes.plot([place - 0.18, place + 0.18], [mean] * 2, color=color, lw=2)
        axes.annotate(f"{mean:.2f}", (place + 0.22, mean), va="center", color=color, fontsize=9.5, fontweight="bold")
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.set_xticks(range(len(ablation.models)), [name.replace(", ", ",\n") for name in ablation.models])
    axes.set_xlim(-0.4, len(ablation.models) - 0.2)


if __name__ == "__main__":
    run_as_script(main)
