"""One update of the weights, one evaluation, and the state of everything that takes part in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from vision.checkpoints import manager
from vision.checkpoints.sharding import like, mapped
from vision.config.run import TrainConfig
from vision.data.dataset import ImageData
from vision.distributed.context import World
from vision.distributed.parallel import distribute, plain, reshard
from vision.training import builders
from vision.training.evaluation import Metrics, evaluate
from vision.training.memory_budget import keep_budget
from vision.utils.seeding import seed_all
from vision.weights import finetune


class Engine:
    """Model, loss, optimizer, schedule, mixup, loss scaling and averaged weights of a run.

    Args:
        config: of the run.
        data: what it trains on.
        updates_per_epoch: for the schedule.
        world: the processes of the run.

    Attributes:
        note: what there is to say about the memory mode, if it was planned.
        beginning: what there is to say about the pretrained weights, if there are any.

    Raises:
        revnets.SpecError: the configuration does not fit the data or the machine.
        CheckpointError: there are no such pretrained weights, or they are of another model.
    """

    def __init__(self, config: TrainConfig, data: ImageData, updates_per_epoch: int, world: World | None = None):
        self.config, self.world = config, world or World()
        self.num_classes = len(data.classes)
        self.passes = config.grad_accum * self.world.size  # forward passes per update, of all processes
        images = config.batch_size * self.passes
        self.device = builders.choose_device(config.device, self.world)
        seed_all(config.seed)  # the same weights in every process
        model = builders.build_model(config, data)
        self.beginning = config.pretrained and finetune.begin(model, config.pretrained, data.classes, self.world)
        self.task = builders.build_task(config, model, data, self.device)
        self.note = keep_budget(config, plain(self.task.get_trainable_module()), data, self.world)
        if config.compile is not None:
            builders.compile_cells(self.model, config.compile)
        distribute(self.task, config.parallel, self.world, self.device)
        self.optimizer = builders.build_optimizer(config, plain(self.task.get_trainable_module()), images)
        self.schedule = builders.build_schedule(config, self.optimizer, updates_per_epoch, images)
        self.mixup = builders.build_mixup(config, self.num_classes)
        self.autocast = builders.build_autocast(config.amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "float16")

    @property
    def model(self) -> nn.Module:
        """The model itself, without what wraps it and without heads at its columns."""
        return plain(self.task.get_eval_model())

    @property
    def ema(self) -> nn.Module | None:
        """The model with averaged weights."""
        return plain(self.task.get_eval_model(ema=True)) if self.task.has_ema() else None

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    def update(self, batches: Iterator[tuple[Tensor, Tensor]], step: int) -> Tensor:
        """One step of the optimizer on the next `grad_accum` batches.

        All that is random in it (mixup, dropout, drop path) is a function of the seed and of the number of the
        forward pass, counted over all processes. So no generator has to be saved, and several processes do what one
        process with accumulation does.

        Args:
            batches: images (B, C, H, W) and class numbers (B,).
            step: how many updates there will have been after this one.

        Returns:
            The loss of this process, still on its device.
        """
        config, total = self.config, torch.zeros((), device=self.device)
        for number in range(config.grad_accum):
            images, labels = self._moved(*next(batches))
            seed_all(config.seed, (step - 1) * self.passes + number * self.world.size + self.world.rank)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            is_last = number == config.grad_accum - 1
            with nullcontext() if is_last else self.task.no_sync():
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

    def _moved(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if self.config.channels_last else torch.preserve_format
        return (
            images.to(self.device, memory_format=layout, non_blocking=True),
            labels.to(self.device, non_blocking=True),
        )

    def evaluate(self, batches: Iterable[tuple[Tensor, Tensor]], tick: Callable[[], None]) -> dict[str, Metrics]:
        """Metrics of the weights (`raw`), and of their average (`ema`) if there is one: then those count."""
        found = {}
        for name, is_average in (("raw", False), ("ema", True)):
            if self.task.has_ema() or not is_average:
                model = plain(self.task.get_trainable_module(is_average))
                found[name] = evaluate(
                    model, batches, self.num_classes, self.device, self.autocast, tick, self.world.size > 1
                )
                reshard(model)
        return found

    def state(self) -> dict[str, Any]:
        """Plain data and tensors, divided ones as they are."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "heads": self.task.get_task_state(),
            "heads_ema": self.task.get_task_state(ema=True) if self.task.has_ema() else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any], path: Path) -> None:
        """Go back to where a state was taken.

        Args:
            path: where it comes from, for messages.

        Raises:
            vision.checkpoints.manager.CheckpointError: it is the state of another model.
        """
        manager.load_weights(self.model, state["model"], path)
        manager.load_heads(plain(self.task.get_trainable_module()), state["heads"], path)
        if self.ema is not None:
            averaged = state["ema"] is not None
            manager.load_weights(self.ema, state["ema"] if averaged else state["model"], path)
            heads = state["heads_ema"] if averaged else state["heads"]
            manager.load_heads(plain(self.task.get_trainable_module(ema=True)), heads, path)
        self.optimizer.load_state_dict(self._optimizer_state(state["optimizer"]))
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.schedule.step_update(state["progress"]["step"])

    def _optimizer_state(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The saved state with tensors that are divided as the parameters are."""
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        of_each = {
            index: mapped(entry, lambda _, leaf, parameter=parameters[index]: like(parameter, leaf))
            for index, entry in saved["state"].items()
        }
        return {**saved, "state": of_each}
