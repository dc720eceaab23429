"""Train a network of reversible columns on real images, then show the memory that it saves: `make demo`.

    python examples/quickstart/demo.py [key=value ...]  # overrides of vision/configs/digits.yaml, such as epochs=40

The output is in runs/demo, which every call replaces.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from revnets import DriftWarning, SpecError, build
from revnets.analysis.audit import audit
from revnets.analysis.audit_report import Audit
from revnets.memory.tracker import kept_bytes
from revnets.plotting.style import MODE_COLORS, save
from revnets.utils.format import size
from vision.checkpoints.manager import CheckpointError
from vision.config.run import TrainConfig, load_config
from vision.tasks.classification import Classification
from vision.training.figures import INK, draw_loss, draw_metric, style
from vision.training.run_log import LOG, read_log
from vision.training.trainer import Trainer, TrainingError

OUTPUT = Path(os.path.relpath(Path(__file__).resolve().parents[2] / "runs" / "demo"))
COLUMNS = (2, 4, 8, 12, 16)
FILES = {"checkpoints", "tensorboard", "config.yaml", "curves.png", "demo.png", "unreadable.txt", LOG, ".lock"}
"""Files of the demo and its run. A directory with any other file is not replaced."""


def main(overrides: Sequence[str]) -> int:
    console = Console()
    torch.set_num_threads(1)  # in so small a network, more threads only wait for each other
    config = load_config("digits", [f"output={OUTPUT}", "resume=none", *overrides])
    output = Path(config.output)
    if (output / "config.yaml").exists() and {path.name for path in output.iterdir()} <= FILES:
        shutil.rmtree(output)
    net = config.net
    console.print(
        f"[bold]Training a network of {net.columns} reversible columns on digits[/bold]: 16 x 16 pixels, "
        f"{len(net.levels)} levels per column, memory mode {net.memory}"
    )
    started = time.perf_counter()
    trainer = Trainer(config, console)
    outcome = trainer.fit()
    if outcome.signal is not None:
        return 128 + outcome.signal
    seconds = time.perf_counter() - started

    images, labels = next(trainer.batches.epoch(0))
    with console.status("measuring the memory saved for backward ..."):
        found = measure(trainer, images, labels)
        by_columns = kept_by_columns(config, images)
    console.print(summary(trainer, found, outcome.score, seconds))
    picture = output / "demo.png"
    save(demo_figure(output, by_columns, len(images)), picture)
    lines = f"figure       {picture}", f"best weights {outcome.best}"
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)
    return 0


def measure(trainer: Trainer, images: Tensor, labels: Tensor) -> Audit:
    """Audit one training step of the trained network in `store` and in `exact`, with its training loss."""
    task = trainer.state.training_task.train()
    device = trainer.state.device
    labels = labels.to(device)
    return audit(
        trainer.state.model,
        images.to(device),
        modes=("store", "exact"),
        loss=lambda scores: task.criterion(scores, labels),
    )


def kept_by_columns(config: TrainConfig, images: Tensor) -> dict[str, list[int]]:
    """Bytes that networks of 2 to 16 columns save for backward, in each memory mode."""
    warnings.simplefilter("ignore", DriftWarning)  # only the bytes of `invert` are measured
    return {
        mode: [
            kept_bytes(build(config.net.model_copy(update={"columns": columns, "memory": mode})), images)
            for columns in COLUMNS
        ]
        for mode in MODE_COLORS
    }


def summary(trainer: Trainer, found: Audit, top1: float, seconds: float) -> Table:
    """Results of the demo as a table."""
    store, exact = (next(mode for mode in found.modes if mode.mode == name) for name in ("store", "exact"))
    parameters = [parameter.numel() for parameter in trainer.state.model.parameters()]
    equal = "[green]equal bit for bit[/green]" if exact.equal else f"[red]differ by {exact.gradient_error:.1e}[/red]"
    table = Table(show_header=False)
    table.add_row("validation accuracy", f"[bold]{top1:.2f} %[/bold] of {len(trainer.data.val)} images, best epoch")
    table.add_row("trained in", f"{seconds:.0f} s on {trainer.state.device.type}")
    table.add_row("parameters", f"{sum(parameters):,}")
    table.add_row("saved for backward, store", f"{size(store.kept_bytes)} for a batch of {trainer.config.batch_size}")
    table.add_row("saved for backward, exact", f"[bold]{size(exact.kept_bytes)}[/bold]")
    table.add_row("ratio", f"{store.kept_bytes / exact.kept_bytes:.1f} times less")
    table.add_row("gradients of the two", f"{equal}, all {len(parameters)} parameter tensors")
    return table


def demo_figure(output: Path, by_columns: dict[str, list[int]], batch: int) -> Figure:
    """Loss, accuracy, and memory against the number of columns."""
    log = read_log(output / LOG)
    figure = Figure(figsize=(13, 4), layout="constrained", facecolor="white")
    loss, accuracy, memory = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    draw_loss(loss, log)
    draw_metric(accuracy, log, *Classification.curves())
    draw_memory(memory, by_columns, batch)
    for axes, title in ((loss, "Loss"), (accuracy, "Accuracy"), (memory, "Memory saved for backward")):
        axes.set_title(title, loc="left", color=INK, fontsize=11)
    return figure


def draw_memory(axes: Axes, by_columns: dict[str, list[int]], batch: int) -> None:
    """Plot bytes saved for backward against the number of columns, on a logarithmic axis with labeled lines."""
    style(axes, "columns", f"MiB for a batch of {batch}")
    axes.set_yscale("log")
    for mode, kept in by_columns.items():
        mebibytes = [count / 2**20 for count in kept]
        axes.plot(COLUMNS, mebibytes, "o-", color=MODE_COLORS[mode], lw=2, markersize=4)
        axes.annotate(
            f"{mode}: {size(kept[-1])}",
            (COLUMNS[-1], mebibytes[-1]),
            (8, 0),
            textcoords="offset points",
            va="center",
            color=MODE_COLORS[mode],
            fontsize=9.5,
            fontweight="bold",
        )
    axes.set_xticks(COLUMNS)
    axes.set_xlim(COLUMNS[0] - 0.5, COLUMNS[-1] + 0.5)
    axes.yaxis.set_major_formatter("{x:g}")


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(print(__doc__))
    try:
        sys.exit(main(sys.argv[1:]))
    except (SpecError, TrainingError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:  # before or after training, which handles it itself
        sys.exit(130)
