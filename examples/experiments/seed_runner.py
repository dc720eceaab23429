"""Train several models with several seeds by `revnets train` and compare them; for the Fashion-MNIST experiments.

Each run is a separate process. Stopped runs are resumed, and finished runs are not repeated.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.flop_counter import FlopCounterMode

from revnets import SpecError
from revnets.utils.atomic_files import replacing
from vision.config.run import TrainConfig, load_config
from vision.data.dataset import ImageData
from vision.data.in_memory import IDX
from vision.data.samplers import TrainBatches
from vision.errors import DataError, TrainingError
from vision.models.architecture import RevCol
from vision.paths import CONFIGS
from vision.supervision.supervised import Supervised
from vision.tasks.builders import build_model
from vision.training.run_log import LOG, read_log

REPO = Path(__file__).resolve().parents[2]
ROOT = Path("/usr/share/datasets/fashion-mnist")
RECIPE = CONFIGS / "fashion.yaml"
TRAIN = (sys.executable, "-c", "from revnets.cli.main import main; main()", "train", str(RECIPE))

# Overrides of the recipe: regularization for long trainings is off, and images are only mirrored.
PLAIN = ("data.shift=0", "data.rotate=0", "data.scale=0", "label_smoothing=0", "ema=null")

Models = Mapping[str, tuple[str, ...]]
"""Overrides of the recipe, by model name."""


class Size(NamedTuple):
    """Size of a model, counted without allocating it."""

    parameters: int
    with_heads: int  # parameters in training, including those that supervision adds
    macs: int  # multiply-accumulates per image


@dataclass
class Run:
    """A model trained from one seed in a separate process, with its output in train.log of its directory."""

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
        """Return `finished`, and the `cpu_seconds` of all processes of this run."""
        file = self.folder / "state.json"
        return json.loads(file.read_text()) if file.exists() else {"finished": False, "cpu_seconds": 0.0}

    def start(self, lock: int) -> None:
        """Start, or resume from the last checkpoint. The process inherits `lock` and holds it until it ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
        with open(self.folder / "train.log", "ab") as log:
            self.process = subprocess.Popen(
                [*TRAIN, *self.overrides],
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,  # Ctrl-C reaches only this script, which signals each process once
            )

    def ended(self, wait: bool = False) -> bool:
        """Return True if the process has ended, and record its CPU time.

        Raises:
            TrainingError: If the process failed.
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
            problem = f"{self} ended with code {code}: {''.join(last)}. The full output is in {log}"
            raise TrainingError(problem, code="process-failed")
        return True

    def updates(self) -> int:
        """Return the number of updates in the log."""
        return max((line["step"] for line in read_log(self.folder / LOG)), default=0)

    def curve(self) -> tuple[list[int], list[float]]:
        """Return the epochs, and the accuracy after each in percent."""
        lines = [line for line in read_log(self.folder / LOG) if line["kind"] == "eval"]
        return [line["epoch"] for line in lines], [line.get("ema_top1", line["raw_top1"]) for line in lines]


def require_files(root: Path) -> None:
    """Check that the data set exists.

    Raises:
        DataError: If a file is missing; the message describes how to get it.
    """
    for name in (name for names in IDX.values() for name in names):
        if not any((root / file).is_file() for file in (name, f"{name}.gz")):
            raise DataError(
                f"{root} has no {name}.gz. Install Debian's package dataset-fashion-mnist (apt-get install "
                "dataset-fashion-mnist), or put the four idx files into a directory and pass it as --root"
            )


def planned(models: Models, model: str, seed: int, overrides: Sequence[str], output: Path) -> Run:
    """Create a run with its configuration.

    Raises:
        TrainingError: If its directory contains a run with other settings.
        revnets.SpecError: If the configuration is invalid.
    """
    folder = output / re.sub(r"\W+", "-", f"{model} {seed}".lower())
    words = (*models[model], *overrides, f"seed={seed}", f"output={folder}")
    run = Run(model, seed, load_config(RECIPE, words), words)
    before = folder / "config.yaml"
    if before.exists() and load_config(before).plain() != run.config.plain():
        text = f"{folder} contains a run with other settings. Use the same settings, or another --output"
        raise TrainingError(text, code="settings-differ")
    return run


def size_of(config: TrainConfig, data: ImageData) -> Size:
    """Count parameters and multiply-accumulates of the model of a run."""
    with torch.device("meta"):
        model = build_model(config, data)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, *data.shape))
        trained = Supervised(model, config.supervision) if config.supervision and isinstance(model, RevCol) else model
    parameters, with_heads = (sum(weight.numel() for weight in net.parameters()) for net in (model, trained))
    return Size(parameters, with_heads, counter.get_total_flops() // 2)


def require_equal(sizes: Mapping[str, Size], parameters: float, macs: float) -> None:
    """Check that all models have equal parameters and multiply-accumulates within these relative differences.

    Raises:
        TrainingError: If they differ by more.
    """
    for kind, share in (("parameters", parameters), ("macs", macs)):
        values = [getattr(size, kind) for size in sizes.values()]
        if max(values) > (1 + share) * min(values):
            text = f"{kind} of the models must be equal within {share:.0%}, but are {values}"
            raise TrainingError(text, code="conflicting-values")


def compare(runs: Sequence[Run], data: ImageData, jobs: int, output: Path, console: Console) -> None:
    """Print the plan, and train the runs that are not finished."""
    first = runs[0].config
    updates = first.total_updates(TrainBatches(first, data).updates)
    console.print(
        f"{len(data.train):,} training and {len(data.val):,} test images; {updates:,} updates of "
        f"{first.batch_size} images; {len(runs)} runs, {jobs} at a time",
        soft_wrap=True,
    )
    with locked(output) as lock:
        train(runs, updates, jobs, lock, console)


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Hold a lock on the directory, which child processes inherit.

    Raises:
        TrainingError: If another call, or a process of one, is still running there.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"runs in {output} are still active. Wait for them, or use another --output"
            raise TrainingError(text, code="output-in-use") from None
        yield file.fileno()


def train(runs: Sequence[Run], updates: int, jobs: int, lock: int, console: Console) -> None:
    """Train all runs, `jobs` at a time. If interrupted, they save their state first."""
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
            console.print("Stopping. Run the same command again to resume.")
        for run in working:
            os.kill(run.process.pid, signal.SIGTERM)
        for run in working:
            run.ended(wait=True)


def spread(values: Sequence[float], digits: int) -> str:
    """Format mean ± standard deviation of a sample, or a single value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def run_as_script(main: Callable[..., None]) -> None:
    """Run the command line of an experiment: errors are one line, and signals let all runs save their state."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: sys.exit(128 + received))  # an exception, so `finally` is reached
    try:
        app()
    except (SpecError, DataError, TrainingError, OSError) as error:
        sys.exit(f"error: {error}")
