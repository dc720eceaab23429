"""From a configuration to the parts of a run: model, task, optimizer, schedule, mixup, autocast. Most are timm's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask
from torch import Tensor, nn

from revnets import Net, SpecError, build
from vision.config import TrainConfig
from vision.data import ImageData

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The device that a configuration names.

    Raises:
        revnets.SpecError: this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SpecError("training run", "device", f"{name} cannot be used ({reason})", "Give auto or cpu") from None
    return torch.device(name)


def build_model(config: TrainConfig, data: ImageData) -> Net:
    """The net, checked against the data that it will see.

    Raises:
        revnets.SpecError: it cannot be built, does not take these images, or has another number of classes.
    """
    model = build(config.net)
    model.eval()  # dropout would draw random numbers, BatchNorm would take the zeros into its statistics
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, *data.shape))
    except RuntimeError as error:
        shape = " x ".join(str(size) for size in data.shape)
        problem = f"does not take images of {shape} ({str(error).splitlines()[0]})"
        raise SpecError("training run", "model", problem, "Change its stem, or data") from error
    if not isinstance(output, Tensor):
        raise SpecError("training run", "model", "does not return class scores alone", "Give it a head and no taps")
    if output.shape != (1, len(data.classes)):
        problem = f"gives {output.shape[-1]} scores for {len(data.classes)} classes"
        raise SpecError("training run", "model.head", problem, f"Set num_classes: {len(data.classes)}")
    return model.train()


def build_task(config: TrainConfig, model: nn.Module, device: torch.device) -> ClassificationTask:
    """The model with its loss, and with the moving average of its weights if there is one."""
    loss = {"smoothing": config.label_smoothing, "soft_targets": config.mixup is not None}
    task = ClassificationTask(model.to(device), criterion_kwargs=loss, device=device, verbose=False)
    if config.ema is not None:
        task.setup_ema(decay=config.ema.decay, use_warmup=config.ema.warmup)
    return task


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer with timm's groups: no weight decay for 1-D parameters (biases, norms, gains).

    Raises:
        revnets.SpecError: it does not take its options, or cannot be made here.
    """
    given = config.optimizer
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.options.items()
    }
    try:
        return create_optimizer_v2(
            model, given.name, lr=given.lr, weight_decay=given.weight_decay, momentum=given.momentum, **options
        )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        problem = f"{given.name} refuses ({error})"
        raise SpecError("training run", "optimizer.options", problem, "See timm.optim") from error


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """A schedule that is a function of the number of updates, and so needs no state of its own."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule.name,
        num_epochs=config.epochs,
        warmup_epochs=cast(int, config.schedule.warmup_epochs),  # a part of an epoch is fine, whatever timm declares
        warmup_lr=config.schedule.warmup_lr,
        min_lr=config.schedule.min_lr,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    assert schedule is not None
    return schedule


def build_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, which also smooth the labels."""
    if config.mixup is None:
        return None
    options = config.mixup.model_dump()
    return Mixup(**options, label_smoothing=config.label_smoothing, num_classes=num_classes)


def build_autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What a forward pass runs in; call it to get the context."""
    return partial(torch.autocast, device.type, dtype=DTYPES.get(amp), enabled=amp in DTYPES)
