"""The task of a run, found by its name or import path and checked against the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from revnets.config.errors import SpecError, nearest
from revnets.config.imports import PartError, imported
from vision.config.run import TASKS, TrainConfig
from vision.errors import first_line, run_error
from vision.tasks.base import Task

OPTIONAL = ("label_smoothing", "mixup", "supervision", "pretrained")
"""Keys of a run that a task must name in `uses`, or else they would be ignored silently."""


def create_task(config: TrainConfig) -> Task:
    """The task that a configuration names.

    Raises:
        revnets.SpecError: it is no task, does not take its options, or does not use a key that is given.
    """
    name, options = config.task_and_options
    path = TASKS.get(name, name)
    if name == "classification" and config.supervision is not None:
        path = "vision.tasks.intermediate_supervision:SupervisedClassification"
    try:
        kind = imported("task", path)
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
