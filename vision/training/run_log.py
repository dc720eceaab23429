"""Reports of a run: checked losses, a log in JSON lines, TensorBoard files and a live progress bar."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import platform
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from revnets.utils.atomic_files import append, replacing
from vision.distributed.context import World
from vision.errors import TrainingError

LOG = "log.jsonl"


KINDS = ("train", "eval")
LARGEST = 1e100
"""Limit of numbers in a log, beyond which figures would fail."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log without damaged lines."""
    return read_records(path)[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of a log, and the number of damaged lines, such as lines truncated by a kill or a power failure.

    A record is a mapping with `kind`, `epoch` and `step`. All other values are numbers, and training has a `loss`.

    Raises:
        OSError: If the log cannot be read, or is not a regular file.
    """
    if not path.exists():
        return [], 0
    if not path.is_file():  # reading a pipe would block
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    found = [_record(line) for line in lines]
    records = [record for record in found if record is not None]
    return records, len(lines) - len(records)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("kind") not in KINDS:
        return None
    values = [value for key, value in record.items() if key != "kind"]
    if not all(isinstance(value, (int, float)) and not LARGEST < abs(value) < math.inf for value in values):
        return None
    if not all(type(record.get(key)) is int and record[key] >= 1 for key in ("epoch", "step")):
        return None
    return None if record["kind"] == "train" and "loss" not in record else record


class RunLogger:
    """Log and TensorBoard files of one run.

    Args:
        folder: Directory of the run. If it is removed during the run, its files are created again.
        step: Number of finished updates. Later records of a killed run are dropped, because they are repeated.
        epoch: Number of evaluated epochs, likewise; None for all in the log.

    Attributes:
        damaged: Number of lines of the log that could not be read.
    """

    def __init__(self, folder: Path, step: int, epoch: int | None = None):
        self.path = folder / LOG
        lines, self.damaged = read_records(self.path)
        kept = [line for line in lines if line["step"] <= step]
        if epoch is not None:  # the run may have been killed between an evaluation and its checkpoint
            kept = [line for line in kept if line["kind"] != "eval" or line["epoch"] <= epoch]
        with replacing(self.path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        # The evaluation at this step may be missing in TensorBoard or be repeated, so its events are replaced.
        self._events = EventFile(folder / "tensorboard", step)
        for line in kept:
            if line["step"] == step:
                self._add_events(line)

    def write(self, kind: str, epoch: int, step: int, values: dict[str, float]) -> None:
        """Write a record of the kind `train` or `eval`."""
        line = {"kind": kind, "epoch": epoch, "step": step, **values}
        append(self.path, (json.dumps(line) + "\n").encode())
        self._add_events(line)

    def sync(self) -> None:
        """Flush all files to the disk, before a checkpoint is saved."""
        for path in (self.path, self._events.path):
            append(path, b"", sync=True)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.sync()

    def _add_events(self, line: dict[str, Any]) -> None:
        values = {key: value for key, value in line.items() if key not in ("kind", "epoch", "step")}
        self._events.add({f"{line['kind']}/{key}": value for key, value in values.items()}, line["step"])


class EventFile:
    """A TensorBoard file of scalars, written immediately in the calling thread.

    TensorBoard's writer uses a thread, which fails with a traceback if the directory is removed, and buffers two
    minutes of events, which are lost if the process is killed.

    Args:
        folder: Directory of the file.
        step: Readers drop events of this and later steps in older files of the directory.
    """

    _numbers = count()

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        name = f"events.out.tfevents.{time.time():017.6f}.{platform.node()}.{os.getpid()}.{next(self._numbers)}"
        self.path = folder / name
        self._write(step, file_version="brain.Event:2")
        self._write(step, session_log=SessionLog(status=SessionLog.START))

    def add(self, values: dict[str, float], step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._write(
            step, summary=Summary(value=[Summary.Value(tag=name, simple_value=values[name]) for name in values])
        )

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(Event(wall_time=time.time(), step=step, **content).SerializeToString())
        append(self.path, record.getvalue())


class ProgressDisplay:
    """A live progress bar on a terminal, and a line per epoch everywhere.

    Args:
        epochs, updates: of the whole run.
    """

    def __init__(self, console: Console, epochs: int, updates: int):
        self.console, self.epochs, self.updates = console, epochs, updates
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("training", total=updates, note="")

    def training(self, epoch: int, step: int) -> None:
        """Show the number of finished updates, and the index of the current epoch."""
        self._progress.update(self._bar, completed=step, description=f"epoch {epoch + 1}/{self.epochs}")

    def note(self, loss: float, score: str, lr: float, rate: str) -> None:
        """Show the latest numbers. `score`, of the last validation, is empty before the first one."""
        self._progress.update(self._bar, note=f"loss {loss:.3f}  {score and f'{score}  '}lr {lr:.0e}  {rate}")

    def validating(self) -> None:
        self._progress.update(self._bar, description="validating")

    def line(self, text: str) -> None:
        """Print above the bar."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Losses:
    """Losses of the updates of an epoch, averaged over all processes.

    Looking at one waits for the device, so they pile up until `check`.
    """

    def __init__(self, world: World):
        self.world = world
        self.checked: list[float] = []
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self._pending.append(loss)

    def begin(self, checked: Tensor | None = None) -> None:
        """Start an epoch, or continue in the middle of one."""
        self.checked, self._pending = [] if checked is None else checked.tolist(), []

    def check(self, epoch: int, step: int, saved: Callable[[], list[Path]]) -> list[float]:
        """Check the losses since the last check.

        Args:
            epoch, step: of the run, for messages.
            saved: Returns the checkpoints, whose losses were finite.

        Returns:
            All losses of the epoch so far.

        Raises:
            TrainingError: If a loss is not finite.
        """
        if self._pending:
            fresh = self.world.mean(torch.stack(self._pending)).tolist()
            self._pending = []
            self.checked += fresh
            for index, loss in enumerate(fresh):
                if not math.isfinite(loss):
                    good = saved()
                    safe = f"The last good state is {good[-1]}" if good else "There is no earlier checkpoint"
                    raise TrainingError(
                        f"the loss is {loss} in epoch {epoch + 1}, step {step - len(fresh) + index + 1}. {safe}. "
                        "Reduce optimizer.lr, set clip_grad, or train with amp: off",
                        code="loss-not-finite",
                    )
        return self.checked


class Clock:
    """Measures samples per second since the last call of `rate`.

    Args:
        samples: Number of samples so far.
    """

    def __init__(self, samples: int = 0) -> None:
        self._before, self._since = samples, time.perf_counter()

    def rate(self, samples: int) -> float:
        now = time.perf_counter()
        rate = (samples - self._before) / (now - self._since)
        self._before, self._since = samples, now
        return rate
