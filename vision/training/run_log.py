"""What a run leaves for its readers: losses, a log in JSON lines, TensorBoard files, a live progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from revnets.utils.atomic_files import replacing
from vision.distributed.context import World
from vision.errors import TrainingError

LOG = "log.jsonl"


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without a last one that a kill cut short."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]  # a whole line ends with a newline


class RunLogger:
    """Log and TensorBoard of one run.

    Args:
        folder: of the run.
        step: where the run begins. Whatever a killed run wrote about later steps is dropped, since it comes again.
    """

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self.path = folder / LOG
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        with replacing(self.path, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in kept)
        self._log = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed in `close`)
        self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, epoch: int, step: int, values: dict[str, float]) -> None:
        """One line: kind (`train` or `eval`), place, values."""
        self._log.write(json.dumps({"kind": kind, "epoch": epoch, "step": step, **values}) + "\n")
        self._log.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self._log.close()
        self._tensorboard.close()

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ProgressDisplay:
    """A live progress bar on a terminal, and a line per epoch everywhere."""

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
        self._bar = self._progress.add_task("training", total=epochs * updates, note="")

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
