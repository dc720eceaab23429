"""From a configuration to the parts of a run: model, task, optimizer, schedule, mixup, autocast. Most are timm's."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import timm
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from revnets import ReversibleColumns, SpecError, build
from revnets.config.errors import nearest
from revnets.config.memory_budget import BudgetSpec
from vision.config.run import TimmModel, TrainConfig
from vision.data.dataset import ImageData
from vision.distributed.context import World
from vision.errors import first_line
from vision.models.architecture import RevCol
from vision.revcol import ARGUMENTS
from vision.supervision.task import SupervisionTask

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
    except (RuntimeError, AssertionError) as error:
        raise SpecError(
            "training run", "device", f"{name} cannot be used ({first_line(error)})", "Give auto or cpu"
        ) from None
    return torch.device(name)


def build_model(config: TrainConfig, data: ImageData) -> nn.Module:
    """The model, checked against the data that it will see; nothing is computed for that.

    Raises:
        revnets.SpecError: it cannot be built, does not take these images, or has another number of classes.
    """
    model = _timm_model(config.model, data) if isinstance(config.model, TimmModel) else build(config.net)
    columns = columns_of(model)
    if config.memory is not None and not isinstance(config.memory, BudgetSpec):
        if columns is None:
            raise SpecError("training run", "memory", "this model has no reversible columns", "Remove the key")
        try:
            columns.memory = config.memory
        except ValueError as error:
            raise SpecError("training run", "memory", str(error), "See docs/reference/yaml.md") from None
    model.eval()  # dropout would draw random numbers, BatchNorm would take the zeros into its statistics
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            output = model(torch.zeros(1, *data.shape, device=next(model.parameters()).device))
    except RuntimeError as error:
        shape = " x ".join(str(size) for size in data.shape)
        problem = f"does not take images of {shape} ({first_line(error)})"
        raise SpecError("training run", "model", problem, "Change its stem, or data") from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        raise SpecError("training run", "model", "does not return class scores alone", "Give it a head and no taps")
    if output.shape[1] != len(data.classes):
        problem = f"gives {output.shape[-1]} scores for {len(data.classes)} classes"
        key = "model.num_classes" if isinstance(config.model, TimmModel) else "model.head"
        raise SpecError("training run", key, problem, f"Set num_classes: {len(data.classes)}")
    return model.train()


def _timm_model(model: TimmModel, data: ImageData) -> nn.Module:
    options = {"num_classes": len(data.classes), "in_chans": data.shape[0], **model.options}
    try:
        return timm.create_model(model.timm, **options)
    except SpecError as error:
        raise SpecError("training run", f"model.{error.key}", error.problem, error.remedy) from error
    except Exception as error:  # models refuse their arguments in many ways
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and model.timm in timm.list_models(module="revcol"):
            remedy = nearest(unknown[1], ARGUMENTS, "It has")
            raise SpecError(
                "training run", f"model.{unknown[1]}", f"{model.timm} has no such argument", remedy
            ) from None
        raise SpecError("training run", "model", f"{model.timm}: {first_line(error)}", "Check its arguments") from error


def columns_of(model: nn.Module) -> ReversibleColumns | None:
    """The reversible columns of a model, if it has any."""
    return next((module for module in model.modules() if isinstance(module, ReversibleColumns)), None)


def build_task(config: TrainConfig, model: nn.Module, data: ImageData, device: torch.device) -> TrainingTask:
    """The model with its loss, with heads at its columns if it is supervised there, and with averaged weights.

    Raises:
        revnets.SpecError: the model cannot be supervised.
    """
    loss = {"smoothing": config.label_smoothing, "soft_targets": config.mixup is not None}
    model = model.to(device)
    if config.channels_last and config.parallel != "fsdp":  # which wants kernels in rows; images lead the way anyhow
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.supervision is None:
        task = ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
    elif isinstance(model, RevCol):
        try:
            task = SupervisionTask(
                model, config.supervision, None, loss, data.mean, data.std, device=device, verbose=False
            )
        except ValueError as error:
            raise SpecError("training run", "supervision", first_line(error), "See docs/guides/training.md") from None
        task.trainable_module.to(device)
    else:
        problem = f"{type(model).__name__} has no reversible columns"
        raise SpecError("training run", "supervision", problem, "Give one of the family, as in {timm: revcol_tiny}")
    if config.ema is not None:
        task.setup_ema(decay=config.ema.decay, use_warmup=config.ema.warmup)
    return task


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
            raise SpecError(
                "training run", "optimizer.layer_decay", "this model has no order of layers", "Take one of timm's"
            )
        options["layer_decay"] = given.layer_decay
    lr = given.lr * given.lr_factor(images_per_update)
    try:
        return create_optimizer_v2(
            model, given.name, lr=lr, weight_decay=given.weight_decay, momentum=given.momentum, **options
        )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        problem = f"{given.name} refuses ({error})"
        raise SpecError("training run", "optimizer.options", problem, "See timm.optim") from error


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


def build_mixup(config: TrainConfig, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, which also smooth the labels."""
    if config.mixup is None:
        return None
    options = config.mixup.model_dump()
    return Mixup(**options, label_smoothing=config.label_smoothing, num_classes=num_classes)


def build_autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """What a forward pass runs in; call it to get the context."""
    return partial(torch.autocast, device.type, dtype=DTYPES.get(amp), enabled=amp in DTYPES)
