"""One update of the weights, one evaluation, and the state of everything that takes part in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from timm.utils.model import unwrap_model
from torch import Tensor
from torch.utils.data import DataLoader

from revnets import Net
from vision import checkpoint, parts
from vision.config import TrainConfig
from vision.data import ImageData
from vision.evaluate import Metrics, evaluate


class Engine:
    """Model, loss, optimizer, schedule, mixup, loss scaling and averaged weights of a run.

    Args:
        config: of the run.
        data: what it trains on.
        updates_per_epoch: for the schedule.

    Raises:
        revnets.SpecError: the configuration does not fit the data or the machine.
    """

    def __init__(self, config: TrainConfig, data: ImageData, updates_per_epoch: int):
        self.config = config
        self.num_classes = len(data.classes)
        self.device = parts.choose_device(config.device)
        self.task = parts.build_task(config, parts.build_model(config, data), self.device)
        self.optimizer = parts.build_optimizer(config, self.model)
        self.schedule = parts.build_schedule(config, self.optimizer, updates_per_epoch)
        self.mixup = parts.build_mixup(config, self.num_classes)
        self.autocast = parts.build_autocast(config.amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")

    @property
    def model(self) -> Net:
        """The net itself, without what wraps it."""
        return cast(Net, unwrap_model(self.task.get_trainable_module()))

    @property
    def ema(self) -> Net | None:
        """The net with averaged weights."""
        average = self.task.get_trainable_module(ema=True)
        return None if average is None else cast(Net, average.module)

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def update(self, batches: Iterator[tuple[Tensor, Tensor]], step: int) -> Tensor:
        """One step of the optimizer on the next `grad_accum` batches.

        Args:
            batches: images (B, C, H, W) and class numbers (B,).
            step: how many updates there will have been after this one.

        Returns:
            The loss, still on its device.
        """
        config, total = self.config, torch.zeros((), device=self.device)
        for _ in range(config.grad_accum):
            images, labels = next(batches)
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            with self.autocast():
                loss = self.task(images, labels)["loss"] / config.grad_accum
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if config.clip_grad is not None:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(self.task.get_clip_parameters(), config.clip_grad, config.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.schedule.step_update(step)
        self.task.update_ema(step)
        return total

    def evaluate(self, batches: DataLoader, tick: Callable[[], None]) -> dict[str, Metrics]:
        """Metrics of the weights (`raw`), and of their average (`ema`) if there is one: then those count."""
        models = {"raw": self.model, "ema": self.ema}
        return {
            name: evaluate(model, batches, self.num_classes, self.device, self.autocast, tick)
            for name, model in models.items()
            if model is not None
        }

    def state(self) -> dict[str, Any]:
        """Plain data and tensors. The schedule has no state: it is a function of the number of updates."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": checkpoint.rng_state(),
        }

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Go back to where a state was taken.

        Args:
            path: where it comes from, for messages.

        Raises:
            vision.checkpoint.CheckpointError: it is the state of another model.
        """
        checkpoint.load_weights(self.model, state["model"], path)
        if self.ema is not None:
            checkpoint.load_weights(self.ema, state["ema"] or state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.schedule.step_update(state["progress"]["step"])
        checkpoint.set_rng_state(state["rng"])
