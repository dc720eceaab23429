"""Training: epochs of updates, an evaluation after each, and checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from timm.utils.random import random_seed
from torch import Tensor

from revnets import SpecError
from revnets.draw import save
from revnets.files import replacing
from vision import checkpoint
from vision.checkpoint import CheckpointError, Checkpoints
from vision.config import TrainConfig
from vision.data import load_data, train_loader, val_loader
from vision.engine import Engine
from vision.evaluate import Metrics
from vision.figures import training_figure
from vision.record import LOG, Display, Record, read_log
from vision.signals import Stopped, StopSignals

FIXED = ("seed", "data", "batch_size", "grad_accum", "optimizer")
"""Keys that an interrupted run must be resumed with. Only the learning rate is free, since the schedule sets it."""


class TrainingError(RuntimeError):
    """A run that cannot go on; says where, what is safe, and what to try."""


@dataclass
class Progress:
    """How far a run has come."""

    epoch: int = 0  # epochs that are trained and evaluated
    step: int = 0  # updates
    best: float = -1.0  # top-1 of the best checkpoint, of the averaged weights where they are kept
    best_step: int = -1  # which checkpoint that is


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended."""

    last: Path | None  # the last checkpoint
    best: Path | None  # the best one
    top1: float  # its accuracy, percent; -1 if no epoch was finished
    signal: int | None = None  # what stopped the run before its end


class Trainer:
    """One training run.

    Args:
        config: all about it.
        console: where lines and the progress bar go.

    Raises:
        revnets.SpecError: the configuration does not fit the data or the machine.
    """

    def __init__(self, config: TrainConfig, console: Console | None = None):
        self.config = config
        self.console = console or Console()
        self.output = Path(config.output)
        random_seed(config.seed)
        self.data = load_data(config.data, config.seed)
        self.batches, self.order = train_loader(config, self.data)
        self.val_batches = val_loader(config, self.data)
        self.engine = Engine(config, self.data, self.order.updates)
        self.checkpoints = Checkpoints(self.output / "checkpoints", config.keep)
        self.progress = Progress()
        self.losses: list[Tensor] = []  # of the updates of this epoch
        self.top1 = -1.0  # of the last validation, percent

    def fit(self) -> Outcome:
        """Train to the end, or until SIGTERM or Ctrl-C; either way the state is saved.

        Raises:
            TrainingError: the loss is not finite.
            CheckpointError: a checkpoint cannot be written, read or used.
            revnets.SpecError: the folder holds a run that this one would overwrite, or that it does not continue.
        """
        random_seed(self.config.seed)  # again: what happened since the trainer was made must not matter
        self._resume()
        with replacing(self.output / "config.yaml", "w") as file:
            yaml.safe_dump({**self.config.plain(), "resume": "auto"}, file, sort_keys=False)
        epochs, progress = self.config.epochs, self.progress
        display = Display(self.console, epochs, self.order.updates)
        with StopSignals() as stop, Record(self.output, progress.step) as record, display:
            try:
                while progress.epoch < epochs:
                    self._epoch(stop, record, display)
            except Stopped:
                path = self._save()
                name = stop.received.name if stop.received else "a signal"
                display.line(f"Stopped by {name} in epoch {progress.epoch + 1}, step {progress.step}; saved {path}")
                display.line(f"Go on with: revnets train {self.output / 'config.yaml'}")
                return self._outcome(stop.received)
        save(training_figure(read_log(self.output / LOG)), self.output / "curves.png")
        return self._outcome()

    def _epoch(self, stop: StopSignals, record: Record, display: Display) -> None:
        started, progress = time.perf_counter(), self.progress
        self._updates(stop, record, display)
        display.validating()
        found = self.engine.evaluate(self.val_batches, stop.check)
        loss = self._finite_losses().mean().item()

        progress.epoch += 1
        self.losses = []
        values = {f"{name}_{key}": value for name, metrics in found.items() for key, value in metrics.scalars().items()}
        record.write("eval", progress.epoch, progress.step, values)
        self.top1 = list(found.values())[-1].top1
        better = self.top1 > progress.best
        if better:
            progress.best, progress.best_step = self.top1, progress.step
        self._save(better)
        display.line(_epoch_line(progress.epoch, self.config.epochs, loss, found, time.perf_counter() - started))

    def _updates(self, stop: StopSignals, record: Record, display: Display) -> None:
        """The updates that this epoch still lacks: all of them, unless the run was resumed in its middle."""
        config, progress = self.config, self.progress
        begun = progress.epoch * self.order.updates
        self.order.begin(progress.epoch, progress.step - begun)
        self.engine.task.train()
        batches, clock = iter(self.batches), _Clock()
        for done in range(progress.step - begun + 1, self.order.updates + 1):
            self.losses.append(self.engine.update(batches, progress.step + 1))
            progress.step += 1
            clock.images += config.batch_size * config.grad_accum
            if done % config.log_every == 0 or done == self.order.updates:
                window = self._finite_losses()[-(done % config.log_every or config.log_every) :]
                values = {"loss": window.mean().item(), "lr": self.engine.lr, "images_per_second": clock.rate()}
                record.write("train", progress.epoch + 1, progress.step, values)
                display.note(values["loss"], self.top1, values["lr"], values["images_per_second"])
            display.training(progress.epoch, progress.step)
            if config.save_every and progress.step % config.save_every == 0:
                self._save()
            stop.check()

    def _finite_losses(self) -> Tensor:
        """The losses of this epoch so far. Looking at them waits for the device, so it is done now and then."""
        losses = torch.stack(self.losses).cpu()
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            index = int(bad[0])
            step = self.progress.step - len(losses) + index + 1
            saved = self.checkpoints.all()
            safe = f"The last good state is {saved[-1]}" if saved else "Nothing was saved before it"
            raise TrainingError(
                f"the loss is {losses[index].item()} in epoch {self.progress.epoch + 1}, step {step}. {safe}. "
                "Lower optimizer.lr, set clip_grad, or train with amp: off"
            )
        return losses

    # -------------------------------------------------------------- checkpoints

    def _save(self, best: bool = False) -> Path:
        if self.losses:
            self._finite_losses()  # what follows a loss that is not finite is no state to keep
        state = {
            "format": checkpoint.FORMAT,
            "versions": checkpoint.versions(),
            "config": self.config.plain(),
            "progress": {**asdict(self.progress), "losses": torch.stack(self.losses).cpu() if self.losses else None},
            **self.engine.state(),
        }
        return self.checkpoints.save(state, best)

    def _resume(self) -> None:
        """Load what `resume` says."""
        resume, there = self.config.resume, self.checkpoints.all()
        if resume == "none":
            if there:
                problem = f"{self.output} holds a run already ({there[-1].name})"
                raise SpecError(
                    "training run", "output", problem, "Use resume=auto to go on with it, or another output"
                )
        elif resume == "auto":
            self._resume_newest(there)
        else:
            path = Path(resume)
            state = checkpoint.read(path)
            if there and checkpoint.step_of(there[-1]) > state["progress"]["step"]:
                problem = f"{self.output} holds a later checkpoint, {there[-1].name}"
                raise SpecError(
                    "training run", "output", problem, "Use resume=auto to go on with it, or another output"
                )
            self._load(state, path)

    def _resume_newest(self, there: list[Path]) -> None:
        """The newest checkpoint that can be read."""
        problem = None
        for path in reversed(there):
            try:
                state = checkpoint.read(path)
            except CheckpointError as error:
                problem = problem or error
                continue
            if problem:
                self.console.print(str(problem), style="yellow", highlight=False, markup=False, soft_wrap=True)
            self._load(state, path)
            return
        if problem:
            raise problem

    def _load(self, state: dict[str, Any], path: Path) -> None:
        _require_same_course(self.config.plain(), state["config"], path)
        self.engine.load_state(state, path)
        progress = dict(state["progress"])
        losses = progress.pop("losses")
        self.losses = [] if losses is None else list(losses.to(self.engine.device))
        self.progress = Progress(**progress)
        if self.progress.best_step == self.progress.step:  # a kill may have come before it got its second name
            self.checkpoints.name_best(path)
        left = self.config.epochs - self.progress.epoch
        where = f"in epoch {self.progress.epoch + 1}" if left > 0 else "finished"
        text = f"Resumed {path}: {where}, step {self.progress.step}"
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _outcome(self, signal: int | None = None) -> Outcome:
        saved, best = self.checkpoints.all(), self.checkpoints.best
        return Outcome(
            last=saved[-1] if saved else None,
            best=best if best.exists() else None,
            top1=self.progress.best,
            signal=signal,
        )


class _Clock:
    """Images per second since it was last asked."""

    def __init__(self) -> None:
        self.images, self._since = 0, time.perf_counter()

    def rate(self) -> float:
        now = time.perf_counter()
        rate = self.images / (now - self._since)
        self.images, self._since = 0, now
        return rate


def _require_same_course(new: dict[str, Any], old: dict[str, Any], path: Path) -> None:
    for key in FIXED:
        ours, theirs = new[key], old[key]
        if key == "optimizer":
            ours, theirs = {**ours, "lr": None}, {**theirs, "lr": None}
        if ours != theirs:
            key, ours, theirs = _first_difference(key, ours, theirs)
            problem = f"{ours}, but the run of {path} has {theirs}"
            raise SpecError("training run", key, problem, "Resume it with that, or give another output")


def _first_difference(key: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """The path of the first value in which two configurations differ, and the value in each."""
    while isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        name = next(name for name in ours if ours[name] != theirs[name])
        key, ours, theirs = f"{key}.{name}", ours[name], theirs[name]
    return key, ours, theirs


def _epoch_line(epoch: int, epochs: int, loss: float, found: dict[str, Metrics], seconds: float) -> str:
    scores = "  ".join(f"{name} {metrics.top1:.2f} %" for name, metrics in found.items())
    val = list(found.values())[-1].loss
    place = f"{epoch:{len(str(epochs))}}/{epochs}"
    return f"epoch {place}  loss {loss:.4f}  val loss {val:.4f}  top-1 {scores}  {seconds:.1f} s"
