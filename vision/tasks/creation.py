"""The model that the configuration of a run names, and what comes out of it, without computing anything."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from revnets import ReversibleColumns, SpecError, build
from revnets.config.errors import nearest
from revnets.config.memory_budget import BudgetSpec
from vision.config.run import TimmModel, TrainConfig
from vision.errors import first_line, run_error
from vision.revcol import ARGUMENTS


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
