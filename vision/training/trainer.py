"""Training: epochs of updates, an evaluation after each, and checkpoints from which a run resumes bit for bit."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from revnets.plotting.style import save
from revnets.utils.atomic_files import make_folder, remove_leftovers, replacing
from revnets.utils.file_lock import FileLock, LockedError
from vision.checkpoints import manager
from vision.checkpoints.manager import Checkpoints
from vision.config.run import TrainConfig
from vision.distributed.context import Stopped, StopSignals, World, world_for
from vision.errors import TrainingError as TrainingError
from vision.errors import run_error
from vision.tasks.base import scalars
from vision.tasks.builders import create_task
from vision.training.figures import training_figure
from vision.training.run_log import LOG, Clock, Losses, ProgressDisplay, RunLogger, read_log
from vision.training.train_state import TrainState

CHECKPOINTS, LOCK = "checkpoints", ".lock"
OWNER = "# Written by `revnets train`"
CONFIG_HEAD = f"{OWNER} whenever this run starts or resumes.\n"


class Trainer:
    """One training run.

    Args:
        config: Of the run.
        console: For messages and the progress bar.
        world: The processes of the run. Each has a trainer, but only the first prints, logs and saves.

    Raises:
        revnets.SpecError: If the configuration does not fit the data or the machine, or the output directory has a run
            that this one would overwrite.
        CheckpointError: If the checkpoint to resume, or pretrained weights, cannot be used.
    """

    def __init__(self, config: TrainConfig, console: Console | None = None, world: World | None = None):
        self.config, self.world = config, world_for(config.parallel, world or World())
        self.console = (console or Console()) if self.world.is_main else Console(quiet=True)
        self.output = Path(config.output)
        self._lock = FileLock(self.output / LOCK)
        self._logger: RunLogger | None = None
        self.world.by_main(self._check_output)
        notes = self.output / ("unreadable.txt" if self.world.is_main else f"unreadable-{self.world.rank}.txt")
        self.task = create_task(config)
        self.data = self.task.load_data(notes, self.world)
        self.batches = self.task.train_batches(self.data, self.world.replicas)
        self.val_batches = self.task.val_batches(self.data, self.world.replicas)
        self.updates = config.total_updates(self.batches.updates)
        self.epochs = -(-self.updates // self.batches.updates)  # the last one may be incomplete
        sharded = config.checkpoint == "sharded" and self.world.size > 1
        self.checkpoints = Checkpoints(self.output / CHECKPOINTS, config.keep, sharded, self.world)
        # The main process chooses the checkpoint to resume. A resumed run does not need pretrained weights.
        self.there = self.world.by_main(self.checkpoints.all)
        self.resumed = self.world.by_main(self._find_checkpoint)
        anew = config if self.resumed is None else config.model_copy(update={"pretrained": None})
        self.state = TrainState(anew, self.data, self.batches.updates, self.world, self.task)
        self.progress, self.losses = Progress(), Losses(self.world)
        self.score: float | None = None  # of the last validation

    def fit(self) -> Outcome:
        """Train to the end, or until SIGTERM or Ctrl-C. The state is saved in both cases.

        Raises:
            TrainingError: If the loss is not finite.
            DataError: If images cannot be read.
            CheckpointError: If a checkpoint cannot be written, read or used.
            revnets.SpecError: If the output directory has a run that this one does not continue, or another run uses
                it.
        """
        try:
            self.world.by_main(self._begin)
            return self._fit()
        finally:
            self._lock.release()

    def _fit(self) -> Outcome:
        for remark in getattr(self.data, "remarks", ()):
            self._warn(remark)
        self._resume()
        self.world.by_main(self._write_config)
        if self.state.beginning:
            self._say(f"Starts from {self.state.beginning}")
        if self.state.note:
            self._say(f"Memory: {self.state.note}")
        with StopSignals(self.world) as stop, self._reporting() as display:
            try:
                while self.progress.epoch < self.epochs:
                    self._epoch(stop, display)
            except Stopped as stopped:
                path, step = self._save(), self.progress.step
                where = f"in epoch {self.progress.epoch + 1}, step {step}"
                display.line(f"Stopped by {stopped.signal.name} {where}; saved {path}")
                display.line(f"To resume: revnets train {self.output / 'config.yaml'}")
                return self._outcome(stopped.signal)
        if self.world.is_main:
            save(training_figure(read_log(self.output / LOG), self.task.curves()), self.output / "curves.png")
        return self._outcome()

    @contextmanager
    def _reporting(self) -> Iterator[ProgressDisplay]:
        display = ProgressDisplay(self.console, self.epochs, self.updates)
        if not self.world.is_main:
            yield display
            return
        with RunLogger(self.output, self.progress.step, self.progress.epoch) as self._logger, display:
            if self._logger.damaged:
                self._warn(f"{self._logger.path}: skipped {self._logger.damaged} damaged lines")
            yield display

    def _epoch(self, stop: StopSignals, display: ProgressDisplay) -> None:
        started, progress, unread = time.perf_counter(), self.progress, self.data.unreadable.count()
        self._updates(stop, display)
        display.validating()
        found = {name: scalars(metrics) for name, metrics in self.state.evaluate(self.val_batches, stop.check).items()}
        losses = self._checked_losses()
        skipped = self.world.replicas.sum(self.data.unreadable.count() - unread)

        progress.epoch += 1
        self.losses.begin()
        values = {f"{name}_{key}": value for name, metrics in found.items() for key, value in metrics.items()}
        if self._logger:
            self._logger.write(
                "eval", progress.epoch, progress.step, values | ({"unreadable": skipped} if skipped else {})
            )
        self.score = score = self.task.score(found)
        is_first = progress.best_step < 0 and not math.isnan(score)
        better = is_first or self.task.is_better(score, progress.best)
        if better:
            progress.best, progress.best_step = score, progress.step
        self._save(better)
        loss, seconds = sum(losses) / max(len(losses), 1), time.perf_counter() - started
        place = f"{progress.epoch:{len(str(self.epochs))}}/{self.epochs}"
        display.line(f"epoch {place}  loss {loss:.4f}  {self.task.summary(found)}  {seconds:.1f} s")
        if skipped:
            display.line(f"{skipped} unreadable images, listed in {self.data.unreadable.file}")

    def _updates(self, stop: StopSignals, display: ProgressDisplay) -> None:
        """Make the remaining updates of this epoch: all of them, unless the run was resumed within the epoch."""
        config, progress, begun = self.config, self.progress, self.progress.epoch * self.batches.updates
        updates = min(self.batches.updates, self.updates - begun)
        self.state.training_task.train()
        batches, clock = self.batches.epoch(progress.epoch, progress.step - begun), Clock(self.state.samples)
        for done in range(progress.step - begun + 1, updates + 1):
            self.losses.add(self.state.update(batches, progress.step + 1))
            progress.step += 1
            if done % config.log_every == 0 or done == updates:
                window = self._checked_losses()[-(done % config.log_every or config.log_every) :]
                unit, short = self.task.samples
                rate = clock.rate(self.state.samples) * self.world.replicas.size
                values = {"loss": sum(window) / len(window), "lr": self.state.lr, f"{unit}_per_second": rate}
                values |= {name: float(part) for name, part in self.state.parts.items()}
                if self._logger:
                    self._logger.write("train", progress.epoch + 1, progress.step, values)
                score = "" if self.score is None else self.task.text(self.score, self.task.digits - 1)
                display.note(values["loss"], score, values["lr"], f"{rate:.0f} {short}/s")
            display.training(progress.epoch, progress.step)
            if config.save_every and progress.step % config.save_every == 0:
                self._save()
            stop.check()

    def _checked_losses(self) -> list[float]:
        return self.losses.check(self.progress.epoch, self.progress.step, self.checkpoints.all)

    # -------------------------------------------------------------- checkpoints

    def _save(self, best: bool = False) -> Path:
        self._checked_losses()  # a state after a loss that is not finite must not be saved
        if self._logger:
            self._logger.sync()
        state = {
            "format": manager.FORMAT,
            "versions": manager.versions(),
            "config": self.config.plain(),
            "world": self.world.replicas.size,
            "samples": manager.sample_counts(self.data),
            "provenance": getattr(self.data, "provenance", {}),
            **self.task.metadata(self.data),
            "progress": self.progress.plain(self.losses),
            **self.state.state(),
        }
        return self.checkpoints.save(state, best)

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint from which the run resumes; None for a new run."""
        if not self.there and self.config.resume in ("auto", "none"):
            return None
        from vision.checkpoints.resume import find_checkpoint  # new runs do not need it

        return find_checkpoint(self.config, self.world, self.there, self._warn)

    def _resume(self) -> None:
        """Load the checkpoint from which the run resumes."""
        path = self.resumed
        if path is None:
            return
        from vision.checkpoints import resume

        state = resume.read(path, self.world)
        resume.require_same_course(self.config, self.world.replicas.size, state, path, self.data)
        self.state.load_state(state, path)
        progress: dict[str, Any] = dict(state["progress"])
        self.losses.begin(progress.pop("losses"))
        self.progress = Progress(**progress)
        if self.progress.step < self.updates:  # a longer run than before finishes an epoch that ended early
            self.progress.epoch = min(self.progress.epoch, self.progress.step // self.batches.updates)
        if self.progress.best_step == self.progress.step:  # the run may have been killed before it was linked as best
            self.world.by_main(lambda: self.checkpoints.name_best(path))
        left = self.epochs - self.progress.epoch
        where = f"in epoch {self.progress.epoch + 1}" if left > 0 else "finished"
        self._say(f"Resumed {path}: {where}, step {self.progress.step}")

    # ------------------------------------------------------------------- output

    def _check_output(self) -> None:
        """Check the output directory before anything is loaded."""
        for folder in (self.output, self.output / CHECKPOINTS):
            _require_folder(folder)
        if self.output.exists():
            self._take_lock()
            self._lock.release()

    def _begin(self) -> None:
        """Lock the output directory for this run."""
        self._take_lock()
        if not self._lock.is_reliable:
            self._warn(f"{self.output}: this file system has no locks. Do not start another run with this output")
        exclusive = self._lock.is_reliable
        remove_leftovers(self.output, exclusive=exclusive)
        self.checkpoints.remove_leftovers(exclusive)
        if self.checkpoints.all() != self.there:
            problem = f"another run has written to {self.output} since this one started"
            raise run_error("output", problem, "Start again to resume it", code="output-in-use")

    def _take_lock(self) -> None:
        try:
            make_folder(self.output)
            self._lock.acquire()
        except LockedError as error:
            problem = f"{self.output} is in use by {error.owner or 'another process'}"
            hint = "Wait until it ends, or give another output"
            raise run_error("output", problem, hint, code="output-in-use") from None
        except OSError as error:
            problem = f"{self.output} cannot be written to ({error.strerror})"
            raise run_error(
                "output", problem, "Check permissions and disk, or give another output", code="unwritable-file"
            ) from error

    def _write_config(self) -> None:
        path = self.output / "config.yaml"
        if not self.checkpoints.all():
            self._require_no_files_of_others(path)
        with replacing(path, "w") as file:
            file.write(CONFIG_HEAD)
            yaml.safe_dump({**self.config.plain(), "resume": "auto"}, file, sort_keys=False)

    def _require_no_files_of_others(self, config: Path) -> None:
        """Require that the output directory is new, or of a run that was killed before its first checkpoint."""
        if config.is_file():
            with open(config, encoding="utf-8", errors="replace") as file:
                if file.readline().startswith(OWNER):
                    return
        for path in (config, self.output / LOG):
            if path.exists():
                problem = f"{path} was not written by a run, which would overwrite it"
                raise run_error("output", problem, "Rename the file, or give another output", code="name-clash")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _warn(self, text: str) -> None:
        self.console.print(text, style="yellow", highlight=False, markup=False, soft_wrap=True)

    def _outcome(self, signal: int | None = None) -> Outcome:
        saved, best = self.checkpoints.all(), self.checkpoints.best
        return Outcome(
            last=saved[-1] if saved else None,
            best=best if best.exists() else None,
            score=self.progress.best,
            text=f"{self.task.name()} {self.task.text(self.progress.best)}",
            signal=signal,
        )


def _require_folder(path: Path) -> None:
    """Require that a path is a directory or can become one.

    Raises:
        revnets.SpecError: If the path, or one of its parents, is a file or a broken link.
    """
    for folder in (path, *path.parents):
        if os.path.lexists(folder):
            if folder.is_dir():
                return
            if folder.is_symlink():
                problem = f"{folder} is a link to {os.readlink(folder)}, which does not exist"
                hint = "Create that directory"
            else:
                problem, hint = f"{folder} is not a directory", "Rename it"
            raise run_error("output", problem, f"{hint}, or give another output", code="not-a-folder")


@dataclass
class Progress:
    """The progress of a run. Its order of samples and its random numbers are functions of the progress and the seed."""

    epoch: int = 0  # number of trained and evaluated epochs
    step: int = 0  # number of updates
    best: float = -1.0  # monitored metric of the best checkpoint, of the averaged weights if there are any
    best_step: int = -1  # updates of the best checkpoint; -1 if there is none yet

    def plain(self, losses: Losses) -> dict[str, Any]:
        """The entry `progress` of a checkpoint."""
        return {**asdict(self), "losses": torch.tensor(losses.checked, dtype=torch.float64)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run."""

    last: Path | None  # the last checkpoint
    best: Path | None  # the best checkpoint
    score: float  # monitored metric of the best checkpoint; -1 if no epoch was finished
    text: str  # the score with name and unit
    signal: int | None = None  # signal that stopped the run
