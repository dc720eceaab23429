"""Does RevCol learn? Fashion-MNIST at a small fixed budget, against one column of the same blocks, over three seeds.

    apt-get install dataset-fashion-mnist         # Debian and Ubuntu; or any folder with the four idx files: --root
    python examples/fashion.py                    # 10 to 12 minutes on 2 CPU cores
    python examples/fashion.py --seeds 1 epochs=2 --output runs/quick

Trains with `revnets train fashion`, two runs side by side, one thread each: RevCol, RevCol with intermediate
supervision, and a ConvNeXt of one column and equal size, all with the same settings. The same command again goes on
where the last one was stopped. Everything is in runs/fashion.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import timm
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from revnets import SpecError
from revnets.draw import save
from revnets.files import replacing
from vision.config import CONFIGS, TimmModel, TrainConfig, load_config
from vision.data import TrainBatches, load_data
from vision.errors import DataError, TrainingError
from vision.figures import INK, style
from vision.imageset import ImageData
from vision.model import RevCol
from vision.record import LOG, read_log
from vision.small import IDX
from vision.supervision import Supervised

REPO = Path(__file__).resolve().parents[1]
OUTPUT = Path(os.path.relpath(REPO / "runs" / "fashion"))
ROOT = Path("/usr/share/datasets/fashion-mnist")

BUDGET = (
    *("epochs=5", "data.train_samples=16000", "batch_size=64", "schedule.warmup_epochs=0.5", "log_every=25"),
    # What slows learning down for the sake of a long training is off; images are only mirrored.
    *("data.shift=0", "data.rotate=0", "data.scale=0", "label_smoothing=0", "ema=null"),
)
"""What is changed in the recipe `fashion`, for all: 1250 updates of 64 images."""

WIDTHS = "timm: test_revcol, dims: [16, 32, 64, 128]"
REVCOL = f"model={{{WIDTHS}, columns: 4, depths: [1, 1, 1, 1]}}"
MODELS = {
    "ConvNeXt": (
        f"model={{{WIDTHS}, columns: 1, depths: [4, 5, 5, 5]}}",
    ),  # what RevCol spends on fusions is depth here
    "RevCol": (REVCOL,),
    "RevCol, supervised": (REVCOL, "supervision={}"),  # with the weights of the paper
}
COLOURS = dict(zip(MODELS, ("#D55E00", "#0072B2", "#009E73"), strict=True))
EQUAL = 0.02
"""By how much parameters and multiply-accumulates of the models may differ."""

RECIPE = CONFIGS / "fashion.yaml"
TRAIN = (sys.executable, "-c", "from revnets.cli import main; main()", "train", str(RECIPE))


class Size(NamedTuple):
    """Of a model, without allocating it."""

    parameters: int
    with_heads: int  # parameters while it trains; those that supervision adds are dropped afterwards
    macs: int  # multiply-accumulates of an image


@dataclass
class Run:
    """A model trained from one seed, by a process of its own. What it says goes into train.log in its folder."""

    model: str
    seed: int
    config: TrainConfig
    overrides: tuple[str, ...]
    process: subprocess.Popen[bytes] | None = None

    @property
    def folder(self) -> Path:
        return Path(self.config.output)

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"

    def state(self) -> dict[str, Any]:
        """`finished`, and `cpu_seconds` of all processes that have worked on it until they ended."""
        file = self.folder / "state.json"
        return json.loads(file.read_text()) if file.exists() else {"finished": False, "cpu_seconds": 0.0}

    def start(self, lock: int) -> None:
        """Begin, or go on from the last checkpoint; `lock` stays locked as long as this works."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with open(self.folder / "train.log", "ab") as log:
            self.process = subprocess.Popen(
                [*TRAIN, *self.overrides],
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C goes to this script alone, which tells each process once
            )

    def ended(self, wait: bool = False) -> bool:
        """Whether its process has ended; then what it took is written down.

        Raises:
            TrainingError: it failed.
        """
        assert self.process is not None
        pid, status, usage = os.wait4(self.process.pid, 0 if wait else os.WNOHANG)
        if pid == 0:
            return False
        code = self.process.returncode = os.waitstatus_to_exitcode(status)
        seconds = self.state()["cpu_seconds"] + usage.ru_utime + usage.ru_stime
        with replacing(self.folder / "state.json", "w") as file:
            json.dump({"finished": code == 0, "cpu_seconds": seconds}, file)
        if code and not wait:
            log = self.folder / "train.log"
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise TrainingError(f"{self} ended with code {code}: {''.join(last)}. All that it said is in {log}")
        return True

    def updates(self) -> int:
        """How many are done, as far as the log knows."""
        return max((line["step"] for line in read_log(self.folder / LOG)), default=0)

    def curve(self) -> tuple[list[int], list[float]]:
        """Epochs, and the accuracy after each in percent."""
        lines = [line for line in read_log(self.folder / LOG) if line["kind"] == "eval"]
        return [line["epoch"] for line in lines], [line.get("ema_top1", line["raw_top1"]) for line in lines]


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="For all runs, key.path=value: epochs=10", show_default=False)
    ] = None,
    root: Annotated[Path, typer.Option(help="Folder with the four idx files, gzipped or not.")] = ROOT,
    output: Annotated[Path, typer.Option(help="Folder of all runs.")] = OUTPUT,
    seeds: Annotated[int, typer.Option(min=1, help="How many runs of every model.")] = 3,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs side by side, one thread each.")] = 2,
) -> None:
    """Train RevCol, with and without supervision, and a ConvNeXt of equal size on Fashion-MNIST, and compare."""
    console = Console()
    require_files(root)
    runs = [
        planned(name, seed, [*BUDGET, f"data.root={root.resolve()}", *(overrides or [])], output)
        for seed in range(seeds)
        for name in MODELS
    ]
    data = load_data(runs[0].config.data, seed=0)
    sizes = {run.model: size_of(run.config, data) for run in runs}
    require_equal(sizes)
    updates = TrainBatches(runs[0].config, data).updates * runs[0].config.epochs
    console.print(
        f"{len(data.train):,} images to learn from and {len(data.val):,} to test; {updates:,} updates of "
        f"{runs[0].config.batch_size} images; {len(runs)} runs, {jobs} at a time",
        soft_wrap=True,
    )
    del data
    with locked(output) as lock:
        train(runs, updates, jobs, lock, console)
    console.print(summary(runs, sizes))
    picture = output / "fashion.png"
    save(figure(runs), picture)
    console.print(f"picture {picture}", highlight=False, soft_wrap=True)


def require_files(root: Path) -> None:
    """Raises DataError with what to do if the data are not there."""
    for name in (name for names in IDX.values() for name in names):
        if not any((root / file).is_file() for file in (name, f"{name}.gz")):
            raise DataError(
                f"{root} has no {name}.gz. Install Debian's package dataset-fashion-mnist (apt-get install "
                "dataset-fashion-mnist), or put the four idx files into a folder and give it with --root"
            )


def planned(model: str, seed: int, overrides: Sequence[str], output: Path) -> Run:
    """A run with its configuration.

    Raises:
        DataError: its folder has a run with another configuration.
        revnets.SpecError: there is no such configuration.
    """
    folder = output / f"{model.lower().replace(', ', '-')}-{seed}"
    words = (*MODELS[model], *overrides, f"seed={seed}", f"output={folder}")
    run = Run(model, seed, load_config(RECIPE, words), words)
    before = folder / "config.yaml"
    if before.exists() and load_config(before).plain() != run.config.plain():
        raise DataError(f"{folder} holds a run with other settings. Give the same ones again, or another --output")
    return run


def size_of(config: TrainConfig, data: ImageData) -> Size:
    """Parameters and multiply-accumulates of the model that a run trains."""
    assert isinstance(config.model, TimmModel)
    options = {"num_classes": len(data.classes), "in_chans": data.shape[0], **config.model.options}
    model = cast(RevCol, timm.create_model(config.model.timm, device="meta", **options))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, *data.shape, device="meta"))
    trained = Supervised(model, config.supervision) if config.supervision else model
    parameters, with_heads = (sum(weight.numel() for weight in net.parameters()) for net in (model, trained))
    return Size(parameters, with_heads, counter.get_total_flops() // 2)


def require_equal(sizes: dict[str, Size]) -> None:
    """Raises DataError unless parameters and multiply-accumulates of all are the same within `EQUAL`."""
    for kind in ("parameters", "macs"):
        values = [getattr(size, kind) for size in sizes.values()]
        if max(values) > (1 + EQUAL) * min(values):
            raise DataError(f"the models are to have equal {kind} within {EQUAL:.0%}, and have {values}")


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Holds a lock on the folder, which processes inherit.

    Raises:
        DataError: another call, or a process that one left behind, is at work there.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"runs in {output} are still going on. Wait for them, or give another --output") from None
        yield file.fileno()


def train(runs: Sequence[Run], updates: int, jobs: int, lock: int, console: Console) -> None:
    """Bring all runs to their end, some side by side. Whatever ends this, they save their state first."""
    waiting, working = [run for run in runs if not run.state()["finished"]], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("updates", total=len(runs) * updates)
            while waiting or working:
                while waiting and len(working) < jobs:
                    working.append(waiting.pop(0))
                    working[-1].start(lock)
                progress.update(bar, description=" | ".join(map(str, working)))
                time.sleep(0.5)
                for run in [run for run in working if run.ended()]:
                    working.remove(run)
                    minutes = run.state()["cpu_seconds"] / 60
                    console.print(f"{run}: {run.curve()[1][-1]:.2f} %, {minutes:.1f} CPU minutes", highlight=False)
                progress.update(bar, completed=sum(run.updates() for run in runs))
    finally:
        working = [run for run in working if run.process and run.process.returncode is None]
        if working:
            console.print("Stopping; the same command goes on from here.")
        for run in working:
            os.kill(run.process.pid, signal.SIGTERM)
        for run in working:
            run.ended(wait=True)


def summary(runs: Sequence[Run], sizes: dict[str, Size]) -> Table:
    """One row a model: its size, and what came out."""
    title = f"Fashion-MNIST, {runs[0].config.epochs} epochs, {len(runs) // len(sizes)} runs of each"
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
    table.caption = "mean ± standard deviation over seeds, after the last epoch; minutes of one run"
    return table


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation of a sample; a single value as it is."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def figure(runs: Sequence[Run]) -> Figure:
    """Accuracy by epoch, of every seed (thin) and their mean; and what each seed came to."""
    found = Figure(figsize=(11, 4), layout="constrained", facecolor="white")
    curves, ends = found.subplots(1, 2, width_ratios=(1.6, 1))
    style(curves, "epoch", "test accuracy, %")
    style(ends, "", "test accuracy, %")
    for place, name in enumerate(MODELS):
        colour, of_model = COLOURS[name], [run.curve() for run in runs if run.model == name]
        epochs = of_model[0][0]
        for _, accuracy in of_model:
            curves.plot(epochs, accuracy, color=colour, lw=0.8, alpha=0.4)
        means = [statistics.mean(values) for values in zip(*(accuracy for _, accuracy in of_model), strict=True)]
        curves.plot(epochs, means, "o-", color=colour, lw=2, markersize=4, label=name)
        last = [accuracy[-1] for _, accuracy in of_model]
        ends.plot([place] * len(last), last, "o", color=colour, markersize=5, alpha=0.7)
        ends.plot([place - 0.18, place + 0.18], [means[-1]] * 2, color=colour, lw=2)
        ends.annotate(
            f"{means[-1]:.2f}", (place + 0.22, means[-1]), va="center", color=colour, fontsize=9.5, fontweight="bold"
        )
    curves.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    curves.legend(frameon=False, loc="lower right", fontsize=9.5, labelcolor="linecolor")
    curves.set_title("Accuracy by epoch: every seed, and their mean", loc="left", color=INK, fontsize=11)
    ends.set_title("After the last epoch", loc="left", color=INK, fontsize=11)
    ends.set_xticks(range(len(MODELS)), [name.replace(", ", ",\n") for name in MODELS])
    ends.set_xlim(-0.4, len(MODELS) - 0.3)
    return found


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: sys.exit(128 + received))  # an exception: runs save their state
    try:
        app()
    except (SpecError, DataError, TrainingError, OSError) as error:
        sys.exit(f"error: {error}")
