"""How far a run has come, how it ended, and the losses on its way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vision.distributed.context import World
from vision.errors import TrainingError


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
