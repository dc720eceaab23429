"""The task and the model that the configuration of a run names, and the shape of what the model gives."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from revnets import ReversibleColumns, SpecError, build
from revnets.config.errors import PartError, nearest
from revnets.config.imports import imported
from revnets.config.memory_budget import BudgetSpec
from vision.config.run import TASKS, TimmModel, TrainConfig
from vision.errors import first_line, run_error
from vision.revcol import ARGUMENTS
from vision.tasks.base import Task

OPTIONAL = ("label_smoothing", "mixup", "supervision", "pretrained")
"""Keys of a run that a task must name in `uses`, or else they would be ignored silently."""


def create_task(config: TrainConfig) -> Task:
    """The task that a configuration names.

    Raises:
        revnets.SpecError: it is no task, does not take its options, or does not use a key that is given.
    """
    name, options = config.task_and_options
    if name == "classification" and config.supervision is not None:
        kind = resolve_name("vision.tasks.intermediate_supervision:SupervisedClassification")
    elif name in TASKS:
        kind = resolve_name(TASKS[name])
    else:
        try:
            kind = imported("task", name)
        except PartError as error:
            raise run_error("task", error.problem, error.remedy, error.code) from None
    if not (inspect.isclass(kind) and issubclass(kind, Task)):
        raise run_error("task", f"{name} is no task", "Derive it from vision.tasks.Task", code="invalid-component")
    _check_options(kind, name, options)
    for key in (key for key in OPTIONAL if key not in kind.uses):
        if getattr(config, key) != TrainConfig.model_fields[key].default:
            raise run_error(key, f"the task {name} does not use it", "Remove the key", code="reserved-key")
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
            remedy = nearest(key, known, "It takes") if known else "Remove it"
            raise run_error(f"task.{key}", f"{name} has no such option", remedy, code="unknown-key")
    for item in parameters:
        is_required = item.default is item.empty and item.kind in (item.KEYWORD_ONLY, item.POSITIONAL_OR_KEYWORD)
        if is_required and item.name not in options:
            raise run_error(f"task.{item.name}", f"{name} needs this option", "Give it", code="missing-key")


def create_model(config: TrainConfig, **defaults: Any) -> nn.Module:
    """The model of a run, in its memory mode, in training mode.

    Args:
        defaults: arguments of a model of timm's registry that the configuration may override, such as `num_classes`.

    Raises:
        revnets.SpecError: it cannot be built.
    """
    model = _timm_model(config.model, defaults) if isinstance(config.model, TimmModel) else build(config.net)
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
    """What a model in evaluation mode returns for one image of this shape (C, H, W): shapes without values.

    Raises:
        revnets.SpecError: it does not take such images.
    """
    was_training = model.training
    model.eval()  # dropout would draw random numbers, BatchNorm would take the zeros into its statistics
    try:
        with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            return model(torch.zeros(1, *shape, device=next(model.parameters()).device))
    except RuntimeError as error:
        sizes = " x ".join(str(size) for size in shape)
        problem = f"does not take images of {sizes} ({first_line(error)})"
        raise run_error("model", problem, "Change its stem, or data", code="input-rejected") from error
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
            remedy = nearest(unknown[1], ARGUMENTS, "It has")
            raise run_error(
                f"model.{unknown[1]}", f"{model.timm} has no such argument", remedy, code="unknown-key"
            ) from None
        raise run_error(
            "model", f"{model.timm}: {first_line(error)}", "Check its arguments", code="component-failed"
        ) from error


def columns_of(model: nn.Module) -> ReversibleColumns | None:
    """The reversible columns of a model, if it has any."""
    return next((module for module in model.modules() if isinstance(module, ReversibleColumns)), None)
