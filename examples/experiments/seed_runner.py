"""What the proofs on Fashion-MNIST share: models trained by `revnets train`, several seeds of each, and compared.

Each run is a process of its own. A run that has been stopped goes on, one that is finished is not trained again.
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

# Changes of the recipe: what slows learning down for the sake of a long training is off; images are only mirrored.
PLAIN = ("data.shift=0", "data.rotate=0", "data.scale=0", "label_smoothing=0", "ema=null")

Models = Mapping[str, tuple[str, ...]]
"""Overrides of the recipe, by the name of a model."""


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
            problem = f"{self} ended with code {code}: {''.join(last)}. Its whole output is in {log}"
            raise TrainingError(problem, code="process-failed")
        return True

    def updates(self) -> int:
        """How many are done, as far as the log knows."""
        return max((line["step"] for line in read_log(self.folder / LOG)), default=0)

    def curve(self) -> tuple[list[int], list[float]]:
        """Epochs, and the accuracy after each in percent."""
        lines = [line for line in read_log(self.folder / LOG) if line["kind"] == "eval"]
        return [line["epoch"] for line in lines], [line.get("ema_top1", line["raw_top1"]) for line in lines]


def require_files(root: Path) -> None:
    """Raises DataError with what to do if the data are not there."""
    for name in (name for names in IDX.values() for name in names):
        if not any((root / file).is_file() for file in (name, f"{name}.gz")):
            raise DataError(
                f"{root} has no {name}.gz. Install Debian's package dataset-fashion-mnist (apt-get install "
                "dataset-fashion-mnist), or put the four idx files into a folder and give it with --root"
            )


def planned(models: Models, model: str, seed: int, overrides: Sequence[str], output: Path) -> Run:
    """A run with its configuration.

    Raises:
        TrainingError: its folder has a run with another configuration.
        revnets.SpecError: there is no such configuration.
    """
    folder = output / re.sub(r"\W+", "-", f"{model} {seed}".lower())
    words = (*models[model], *overrides, f"seed={seed}", f"output={folder}")
    run = Run(model, seed, load_config(RECIPE, words), words)
    before = folder / "config.yaml"
    if before.exists() and load_config(before).plain() != run.config.plain():
        text = f"{folder} holds a run with other settings. Give the same ones again, or another --output"
        raise TrainingError(text, code="settings-differ")
    return run


def size_of(config: TrainConfig, data: ImageData) -> Size:
    """Parameters and multiply-accumulates of the model that a run trains."""
    with torch.device("meta"):
        model = build_model(config, data)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.eval()(torch.empty(1, *data.shape))
        trained = Supervised(model, config.supervision) if config.supervision and isinstance(model, RevCol) else model
    parameters, with_heads = (sum(weight.numel() for weight in net.parameters()) for net in (model, trained))
    return Size(parameters, with_heads, counter.get_total_flops() // 2)


def require_equal(sizes: Mapping[str, Size], parameters: float, macs: float) -> None:
    """Raises TrainingError unless parameters and multiply-accumulates of all are the same within these shares."""
    for kind, share in (("parameters", parameters), ("macs", macs)):
        values = [getattr(size, kind) for size in sizes.values()]
        if max(values) > (1 + share) * min(values):
            text = f"the models are to have equal {kind} within {share:.0%}, and have {values}"
            raise TrainingError(text, code="conflicting-values")


def compare(runs: Sequence[Run], data: ImageData, jobs: int, output: Path, console: Console) -> None:
    """Say what is to be done, and do what of it is not done yet."""
    first = runs[0].config
    updates = first.total_updates(TrainBatches(first, data).updates)
    console.print(
        f"{len(data.train):,} images to learn from and {len(data.val):,} to test; {updates:,} updates of "
        f"{first.batch_size} images; {len(runs)} runs, {jobs} at a time",
        soft_wrap=True,
    )
    with locked(output) as lock:
        train(runs, updates, jobs, lock, console)


@contextmanager
def locked(output: Path) -> Iterator[int]:
    """Holds a lock on the folder, which processes inherit.

    Raises:
        TrainingError: another call, or a process that one left behind, is at work there.
    """
    output.mkdir(parents=True, exist_ok=True)
    with open(output / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"runs in {output} are still going on. Wait for them, or give another --output"
            raise TrainingError(text, code="output-in-use") from None
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


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation of a sample; a single value as it is."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def run_as_script(main: Callable[..., None]) -> None:
    """The command line of a proof: an error is one line, and whatever ends it lets all runs save their state."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: sys.exit(128 + received))  # an exception, so `finally` is reached
    try:
        app()
    except (SpecError, DataError, TrainingError, OSError) as error:
        sys.exit(f"error: {error}")
