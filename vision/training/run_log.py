"""What a run leaves for its readers: losses, a log in JSON lines, TensorBoard files, a live progress bar."""

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
"""No number of a log is beyond it; figures would fail."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without those that are damaged."""
    return read_records(path)[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of a log, and how many are left out: cut short by a kill, filled with zeros by a power cut, edited.

    A line is a mapping with `kind`, `epoch` and `step`; all else in it are numbers, and training has a `loss`.

    Raises:
        OSError: the log cannot be read, or is no regular file.
    """
    if not path.exists():
        return [], 0
    if not path.is_file():  # a pipe would be waited for
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
        folder: of the run. It may be removed while the run goes on: then its files begin anew.
        step, epoch: where the run begins: updates, and epochs that are evaluated (None: all that the log has). Whatever
            a killed run wrote about later ones is dropped, since it comes again.

    Attributes:
        damaged: how many lines of the log were left out because they could not be read.
    """

    def __init__(self, folder: Path, step: int, epoch: int | None = None):
        self.path = folder / LOG
        lines, self.damaged = read_records(self.path)
        kept = [line for line in lines if line["step"] <= step]
        if epoch is not None:  # a run may be killed between an evaluation and its checkpoint
            kept = [line for line in kept if line["kind"] != "eval" or line["epoch"] <= epoch]
        with replacing(self.path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        # The evaluation at this step may be missing in TensorBoard or may come again, so what it has there is replaced.
        self._events = EventFile(folder / "tensorboard", step)
        for line in kept:
            if line["step"] == step:
                self._add_events(line)

    def write(self, kind: str, epoch: int, step: int, values: dict[str, float]) -> None:
        """One line: kind (`train` or `eval`), place, values."""
        line = {"kind": kind, "epoch": epoch, "step": step, **values}
        append(self.path, (json.dumps(line) + "\n").encode())
        self._add_events(line)

    def sync(self) -> None:
        """Flush all files to the disk, before a checkpoint that relies on them."""
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
    """A file of scalars for TensorBoard, written at once and in the calling thread.

    TensorBoard's own writer has a thread, which dies with a traceback when the folder is removed, and holds back two
    minutes of events, which a kill loses.

    Args:
        step: readers drop what older files of the folder have of this step and later ones.
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
        """Show that `step` updates are done, in the epoch of that number (from 0)."""
        self._progress.update(self._bar, completed=step, description=f"epoch {epoch + 1}/{self.epochs}")

    def note(self, loss: float, score: str, lr: float, rate: str) -> None:
        """Show the newest numbers; `score`, of the last validation, is empty before the first one."""
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
        """Begin an epoch, or go on in the middle of one."""
        self.checked, self._pending = [] if checked is None else checked.tolist(), []

    def check(self, epoch: int, step: int, saved: Callable[[], list[Path]]) -> list[float]:
        """All losses of the epoch so far.

        Args:
            epoch, step: where the run is, for messages.
            saved: gives the checkpoints, which are all good.

        Raises:
            TrainingError: one is not finite.
        """
        if self._pending:
            fresh = self.world.mean(torch.stack(self._pending)).tolist()
            self._pending = []
            self.checked += fresh
            for index, loss in enumerate(fresh):
                if not math.isfinite(loss):
                    good = saved()
                    safe = f"The last good state is {good[-1]}" if good else "Nothing was saved before it"
                    raise TrainingError(
                        f"the loss is {loss} in epoch {epoch + 1}, step {step - len(fresh) + index + 1}. {safe}. "
                        "Lower optimizer.lr, set clip_grad, or train with amp: off",
                        code="loss-not-finite",
                    )
        return self.checked


class Clock:
    """Samples per second since it was last asked.

    Args:
        samples: how many there have been so far.
    """

    def __init__(self, samples: int = 0) -> None:
        self._before, self._since = samples, time.perf_counter()

    def rate(self, samples: int) -> float:
        now = time.perf_counter()
        rate = (samples - self._before) / (now - self._since)
        self._before, self._since = samples, now
        return rate
