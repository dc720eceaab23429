"""Builds the components of a run from its configuration: task, model, device, optimizer, schedule and autocast."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import partial
from itertools import chain
from pkgutil import resolve_name
from typing import Any, cast

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call

from revnets import ReversibleColumns, SpecError, build
from revnets.config.errors import PartError, nearest
from revnets.config.imports import imported
from revnets.config.memory_budget import BudgetSpec
from vision.config.learning import OptimizerConfig, TimmModel, TransformersModel
from vision.config.run import TASKS, TrainConfig
from vision.distributed.context import World
from vision.errors import first_line, run_error
from vision.revcol import ARGUMENTS
from vision.tasks.base import Task

OPTIONAL = ("label_smoothing", "mixup", "supervision", "pretrained", "heads")
"""Keys of a run that a task must list in `uses`, so that none is ignored silently."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def create_task(config: TrainConfig) -> Task:
    """Create the task of a configuration.

    Raises:
        revnets.SpecError: If the class is not a task, refuses its options, or does not support a key that is given.
    """
    name, options = config.task_and_options
    if name == "classification" and config.heads is not None:
        module = "vision.tasks.multi_target"
        kind = resolve_name(f"{module}:{'MultiTarget' if config.supervision is None else 'SupervisedMultiTarget'}")
    elif name == "classification" and config.supervision is not None:
        kind = resolve_name("vision.tasks.intermediate_supervision:SupervisedClassification")
    elif name in TASKS:
        try:
            kind = resolve_name(TASKS[name])
        except ModuleNotFoundError as error:
            remedy = "pip install 'revnets[dense]'"
            problem = f"{name} needs {error.name}, which is not installed"
            raise run_error("task", problem, remedy, code="missing-dependency") from None
    else:
        try:
            kind = imported("task", name)
        except PartError as error:
            raise run_error("task", error.problem, error.remedy, error.code) from None
    if not (inspect.isclass(kind) and issubclass(kind, Task)):
        raise run_error("task", f"{name} is not a task", "Derive it from vision.tasks.Task", code="invalid-component")
    _check_options(kind, name, options)
    for key in (key for key in OPTIONAL if key not in kind.uses):
        if getattr(config, key) != TrainConfig.model_fields[key].default:
            raise run_error(key, f"the task {name} does not support it", "Remove the key", code="reserved-key")
    try:
        return kind(config, **options)
    except (TypeError, ValueError) as error:
        if isinstance(error, SpecError):
            raise
        raise run_error(
            "task", f"{name} refuses its options ({first_line(error)})", "Change them", code="component-failed"
        ) from error


def _check_options(kind: type[Task], name: str, options: Mapping[str, Any]) -> None:
    parameters = list(inspect.signature(kind).parameters.values())[1:]
    known: Sequence[str] = [item.name for item in parameters if item.kind is not item.VAR_KEYWORD]
    if len(known) == len(parameters):
        for key in (key for key in options if key not in known):
            hint = nearest(key, known, "Known options are") if known else "Remove it"
            raise run_error(f"task.{key}", f"{name} has no such option", hint, code="unknown-key")
    for item in parameters:
        is_required = item.default is item.empty and item.kind in (item.KEYWORD_ONLY, item.POSITIONAL_OR_KEYWORD)
        if is_required and item.name not in options:
            raise run_error(f"task.{item.name}", f"{name} requires this option", "Add it", code="missing-key")


def create_model(config: TrainConfig, **defaults: Any) -> nn.Module:
    """Create the model of a run in training mode, with the memory mode of the run.

    Args:
        config: Of the run.
        defaults: Arguments of a timm or transformers model that the configuration may override, such as `num_classes`.

    Raises:
        revnets.SpecError: If the model cannot be built.
    """
    if isinstance(config.model, TimmModel):
        model = _timm_model(config.model, defaults)
    elif isinstance(config.model, TransformersModel):
        model = _transformers_model(config.model, defaults)
    else:
        model = build(config.net)
    if config.memory is not None and not isinstance(config.memory, BudgetSpec):
        columns = columns_of(model)
        if columns is None:
            raise run_error("memory", "this model has no reversible columns", "Remove the key", code="no-columns")
        try:
            columns.memory = config.memory
        except ValueError as error:
            raise run_error("memory", str(error), "See docs/reference/yaml.md", code="conflicting-values") from None
    return model.train()


def fake_output(model: nn.Module, shape: Sequence[int]) -> Any:
    """The output of a model in evaluation mode for one image of this shape (C, H, W), without values.

    Raises:
        revnets.SpecError: If the model does not accept such images.
    """
    was_training, device = model.training, next(model.parameters()).device
    weights = {name: tensor.to("meta") for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    model.eval()  # so that dropout draws no random numbers, and BatchNorm does not update its statistics
    try:
        with torch.no_grad():
            try:
                return functional_call(model, weights, (torch.zeros(1, *shape, device="meta"),))
            except Exception:  # it creates tensors on a named device, which the slower fake tensors support
                with FakeTensorMode(allow_non_fake_inputs=True):
                    return model(torch.zeros(1, *shape, device=device))
    except RuntimeError as error:
        sizes = " x ".join(str(size) for size in shape)
        problem = f"the model does not accept images of {sizes} ({first_line(error)})"
        raise run_error("model", problem, "Change its stem or the data", code="input-rejected") from error
    finally:
        model.train(was_training)


def _timm_model(model: TimmModel, defaults: dict[str, Any]) -> nn.Module:
    try:
        return timm.create_model(model.timm, **{**defaults, **model.options})
    except SpecError as error:
        raise run_error(f"model.{error.key}", error.problem, error.remedy, error.code) from error
    except Exception as error:  # models refuse their arguments in many ways
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and model.timm in timm.list_models(module="revcol"):
            remedy = nearest(unknown[1], ARGUMENTS, "Known arguments are")
            raise run_error(
                f"model.{unknown[1]}", f"{model.timm} has no such argument", remedy, code="unknown-key"
            ) from None
        raise run_error(
            "model", f"{model.timm}: {first_line(error)}", "Check its arguments", code="component-failed"
        ) from error


def _transformers_model(model: TransformersModel, defaults: dict[str, Any]) -> nn.Module:
    """A language model with new weights, without a key-value cache, which training does not need."""
    try:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    except ImportError:
        problem = "transformers is not installed"
        raise run_error("model.hf", problem, "pip install 'revnets[hf]'", code="missing-dependency") from None
    if model.hf not in CONFIG_MAPPING:
        remedy = nearest(model.hf, CONFIG_MAPPING, "It has")
        raise run_error("model.hf", f"transformers has no model {model.hf!r}", remedy, code="unknown-model")
    kind = CONFIG_MAPPING[model.hf]
    known = [*(field.name for field in fields(kind)), *kind.attribute_map]
    for key in (key for key in model.options if key not in known):
        remedy = nearest(key, known, "Known arguments are")
        raise run_error(f"model.{key}", f"{model.hf} has no such argument", remedy, code="unknown-key")
    try:
        config = kind(**{"use_cache": False, **defaults, **model.options})
        return cast(nn.Module, AutoModelForCausalLM.from_config(config))
    except SpecError as error:
        raise run_error(f"model.{error.key}", error.problem, error.remedy, error.code) from error
    except Exception as error:  # models refuse their arguments in many ways
        problem = f"{model.hf}: {first_line(error)}"
        raise run_error("model", problem, "Check its arguments", code="component-failed") from error


def columns_of(model: nn.Module) -> ReversibleColumns | None:
    """The reversible columns of a model, if it has any."""
    return next((module for module in model.modules() if isinstance(module, ReversibleColumns)), None)


def choose_device(name: str, world: World | None = None) -> torch.device:
    """The device of a configuration. Each of several processes on a machine uses its own GPU.

    Raises:
        revnets.SpecError: If the device does not exist or cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{world.local_rank if world else 0}"
    try:
        torch.empty(0, device=name)
        if torch.device(name).type == "meta":
            raise RuntimeError("it has no values")
    except (RuntimeError, AssertionError, ImportError) as error:
        raise run_error(
            "device", f"{name} cannot be used ({first_line(error)})", "Give auto or cpu", code="unusable-device"
        ) from None
    return torch.device(name)


def build_model(config: TrainConfig, data: Any) -> nn.Module:
    """Build the model of a run by its task, and check it against the data.

    Raises:
        revnets.SpecError: If the model cannot be built, or does not fit the data.
    """
    return create_task(config).build_model(data)


def build_task(
    config: TrainConfig, model: nn.Module, data: Any, device: torch.device, task: Task | None = None
) -> TrainingTask:
    """timm's task around the model of a run, on the device, and with averaged weights if the run has them.

    Args:
        config, model, data, device: of the run.
        task: Of the run; created from the configuration if None.

    Raises:
        revnets.SpecError: If the model does not fit the task.
    """
    model = model.to(device)
    if (
        config.channels_last and config.parallel != "fsdp"
    ):  # FSDP2 needs contiguous weights; images in this layout are enough
        model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    training_task = (task or create_task(config)).training_task(model, data, device)
    if config.ema is not None:
        training_task.setup_ema(decay=config.ema.decay, use_warmup=config.ema.warmup)
    return training_task


def has_budget(config: TrainConfig, model: nn.Module) -> bool:
    """Whether the memory mode is planned for a budget of the run or of its model."""
    columns = columns_of(model)
    budget = config.memory if isinstance(config.memory, BudgetSpec) else columns.budget if columns else None
    return columns is not None and isinstance(budget, BudgetSpec)


def compile_cells(model: nn.Module, backend: str) -> None:
    """Compile the cells, or the whole model if it has no columns.

    Cells share their code, and each compiles it for its own shapes. With dynamic shapes, a replay could use another
    compiled version than its forward pass, which saves other tensors.
    """
    columns = columns_of(model)
    dynamo = torch._dynamo.config
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 8 * sum(1 for _ in model.modules()))
    (columns or model).compile(backend=backend, dynamic=False)


def build_optimizer(config: TrainConfig, model: nn.Module, images_per_update: int) -> torch.optim.Optimizer:
    """Build timm's optimizer with timm's groups: no weight decay for 1-D parameters (biases, norms, gains).

    A model without an order of layers, such as a detector, uses that of its RevCol backbone.

    Raises:
        revnets.SpecError: If the optimizer refuses its options, or cannot be used here.
    """
    given = config.optimizer
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in given.options.items()
    }
    if given.backbone_lr_scale != 1 or (given.layer_decay is not None and not hasattr(model, "group_matcher")):
        options["param_group_fn"] = partial(_groups_around_backbone, given)
    elif given.layer_decay is not None:
        options["layer_decay"] = given.layer_decay
    lr = given.lr * given.lr_factor(images_per_update)
    try:
        return create_optimizer_v2(
            model, given.name, lr=lr, weight_decay=given.weight_decay, momentum=given.momentum, **options
        )
    except SpecError:
        raise
    except Exception as error:  # optimizers refuse their options in many ways
        problem = f"{given.name} refuses ({error})"
        raise run_error("optimizer.options", problem, "See timm.optim", code="component-failed") from error


def _groups_around_backbone(given: OptimizerConfig, model: nn.Module) -> list[dict[str, Any]]:
    from vision.models.parameter_groups import parameter_groups

    try:
        return parameter_groups(model, given.weight_decay, given.layer_decay, given.backbone_lr_scale)
    except LookupError:
        key, text = "layer_decay", "this model has no order of layers"
        if given.backbone_lr_scale != 1:
            key, text = "backbone_lr_scale", "this model is not a backbone with heads"
        hint = "Remove the key" if key == "backbone_lr_scale" else "Use a timm model"
        raise run_error(f"optimizer.{key}", text, hint, code="conflicting-values") from None


def build_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, updates_per_epoch: int, images_per_update: int
) -> Scheduler:
    """Build the schedule, which is a function of the number of updates and needs no state.

    Raises:
        revnets.SpecError: If the warm-up is not shorter than the run.
    """
    given, factor = config.schedule, config.optimizer.lr_factor(images_per_update)
    total = config.total_updates(updates_per_epoch)
    warmup = given.warmup_epochs * updates_per_epoch if given.warmup_updates is None else given.warmup_updates
    if warmup >= total:
        key = "epochs" if given.warmup_updates is None else "updates"
        text = f"a warm-up of {warmup:g} updates is not shorter than the run of {total}"
        raise run_error(f"schedule.warmup_{key}", text, "Give fewer", code="conflicting-values")
    ratio, unit = given.warmup_ratio, updates_per_epoch if config.updates is None else 1
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="multistep" if given.name == "step" else given.name,
        num_epochs=total,
        warmup_epochs=cast(int, warmup),  # fractions work, despite timm's annotation
        warmup_lr=factor * (given.warmup_lr if ratio is None else ratio * config.optimizer.lr),
        min_lr=given.min_lr * factor,
        decay_milestones=[
            round(milestone * unit) + 1 for milestone in given.milestones
        ],  # timm's start one update earlier
        decay_rate=given.power if given.name == "poly" else given.decay_rate,
        step_on_epochs=False,
        updates_per_epoch=1,
    )
    assert schedule is not None
    return schedule


def build_autocast(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A function that returns the autocast context of a forward pass."""
    return partial(torch.autocast, device.type, dtype=DTYPES.get(amp), enabled=amp in DTYPES)


def unwrapped(module: nn.Module | None) -> nn.Module:
    """The model without the wrappers of DDP and torch.compile."""
    assert module is not None
    return unwrap_model(module)
