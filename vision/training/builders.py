"""From a configuration to the parts of a run: model, task, optimizer, schedule, autocast. Most are timm's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import nn

from revnets.config.memory_budget import BudgetSpec
from vision.config.run import TrainConfig
from vision.distributed.context import World
from vision.errors import first_line, run_error
from vision.tasks.base import Task
from vision.tasks.creation import columns_of as columns_of
from vision.tasks.creation import create_task

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str, world: World | None = None) -> torch.device:
    """The device that a configuration names; of several processes on a machine each takes its own GPU.

    Raises:
        revnets.SpecError: this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{world.local_rank if world else 0}"
    try:
        torch.empty(0, device=name)
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds shapes without numbers")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise run_error(
            "device", f"{name} cannot be used ({first_line(error)})", "Give auto or cpu", code="unusable-device"
        ) from None
    return torch.device(name)


def build_model(config: TrainConfig, data: Any) -> nn.Module:
    """The model of a run as its task builds it, checked against the data.

    Raises:
        revnets.SpecError: it cannot be built, or does not fit the data.
    """
    return create_task(config).build_model(data)


def build_task(
    config: TrainConfig, model: nn.Module, data: Any, device: torch.device, task: Task | None = None
) -> TrainingTask:
    """timm's task around the model of a run, on the device, and with averaged weights.

    Args:
        task: of the run; made from the configuration if None.

    Raises:
        revnets.SpecError: the model does not serve the task.
    """
    model = model.to(device)
    if config.channels_last and config.parallel != "fsdp":  # which wants kernels in rows; images lead the way anyhow
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    training_task = (task or create_task(config)).training_task(model, data, device)
    if config.ema is not None:
        training_task.setup_ema(decay=config.ema.decay, use_warmup=config.ema.warmup)
    return training_task


def has_budget(config: TrainConfig, model: nn.Module) -> bool:
    """Is the memory mode of a run chosen under a budget, the run's or that of its model?"""
    columns = columns_of(model)
    budget = config.memory if isinstance(config.memory, BudgetSpec) else columns.budget if columns else None
    return columns is not None and isinstance(budget, BudgetSpec)


def compile_cells(model: nn.Module, backend: str) -> None:
    """Compile the cells, or the whole of a model without columns.

    Cells share their code, and each compiles it for its own shapes. Were shapes dynamic, a replay could meet another
    version than its forward did, which saves other tensors.
    """
    columns = columns_of(model)
    dynamo = torch._dynamo.config
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 8 * sum(1 for _ in model.modules()))
    (columns or model).compile(backend=backend, dynamic=False)


def build_optimizer(config: TrainConfig, model: nn.Module, images_per_update: int) -> torch.optim.Optimizer:
    """timm's optimizer with timm's groups: no weight decay for 1-D parameters (biases, norms, gains).

    Raises:
        revnets.SpecError: it does not take its options, or cannot be made here.
    """
    given = config.optimizer
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.options.items()
    }
    if given.layer_decay is not None:
        if not hasattr(model, "group_matcher"):
            raise run_error(
                "optimizer.layer_decay",
                "this model has no order of layers",
                "Take one of timm's",
                code="conflicting-values",
            )
        options["layer_decay"] = given.layer_decay
    lr = given.lr * given.lr_factor(images_per_update)
    try:
        return create_optimizer_v2(
            model, given.name, lr=lr, weight_decay=given.weight_decay, momentum=given.momentum, **options
        )
    except Exception as error:  # optimizers refuse their options in many ways
        problem = f"{given.name} refuses ({error})"
        raise run_error("optimizer.options", problem, "See timm.optim", code="component-failed") from error


def build_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, updates_per_epoch: int, images_per_update: int
) -> Scheduler:
    """A schedule that is a function of the number of updates, and so needs no state of its own."""
    factor = config.optimizer.lr_factor(images_per_update)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule.name,
        num_epochs=config.epochs,
        warmup_epochs=cast(int, config.schedule.warmup_epochs),  # a part of an epoch is fine, whatever timm declares
        warmup_lr=config.schedule.warmup_lr * factor,
        min_lr=config.schedule.min_lr * factor,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    assert schedule is not None
    return schedule


def build_autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What a forward pass runs in; call it to get the context."""
    return partial(torch.autocast, device.type, dtype=DTYPES.get(amp), enabled=amp in DTYPES)


def unwrapped(module: nn.Module | None) -> nn.Module:
    """The model without the wrappers of DDP and torch.compile."""
    assert module is not None
    return unwrap_model(module)
