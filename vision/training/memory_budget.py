"""A memory budget for a training run: which cells keep everything, so that all that the run holds stays under it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from revnets import plan
from revnets.config.memory_budget import OPTIMIZERS, BudgetSpec
from revnets.memory.tracker import tensors
from revnets.models.plan import PlanError
from vision.config.run import TrainConfig
from vision.distributed.context import World
from vision.errors import first_line, run_error
from vision.tasks.builders import DTYPES, build_optimizer, columns_of


def plan_run_memory(config: TrainConfig, model: nn.Module, shape: Sequence[int] | None, world: World) -> str | None:
    """Choose the memory mode under a budget, if the run has one; returns a sentence about the choice.

    It is done before weights are divided, for the shape of the training batch.

    Args:
        shape: of one sample; None if they have several.
        world: the processes of the run.

    Raises:
        revnets.SpecError: nothing fits.
    """
    columns = columns_of(model)
    budget = config.memory if isinstance(config.memory, BudgetSpec) else columns.budget if columns else None
    if not isinstance(budget, BudgetSpec) or columns is None:
        return None
    if shape is None:
        problem = "samples of this task have no shape for which memory could be planned"
        raise run_error("memory.budget", problem, "Give the memory mode of the columns", code="missing-shape")
    own = "optimizer" not in budget.model_fields_set
    states = optimizer_states(config, next(model.parameters()).device) if own else OPTIMIZERS[budget.optimizer]
    try:
        chosen = plan(
            model,
            (config.batch_size, *shape),
            dtype=DTYPES.get(config.amp, torch.float32),
            optimizer=states + (config.ema is not None),
            ranks=budget.ranks or world.size,
            sharding=budget.sharding or config.parallel,
            grad_accum=max(budget.grad_accum, config.grad_accum),
            budget=budget.budget,
            host=budget.host,
            link=budget.link,
            flops=budget.flops,
            modes=(),
        )
    except PlanError as error:
        raise run_error(
            "memory.budget", first_line(error), "Lower batch_size, or give more", code="over-budget"
        ) from None
    chosen.apply(model)
    return chosen.sentence


def optimizer_states(config: TrainConfig, device: torch.device | str = "cpu") -> int:
    """Tensors of a weight's size that the run's optimizer holds: found by its first step, on a small weight.

    One that cannot take such a step, because it wants more than a gradient, counts as AdamW.
    """
    small = nn.Linear(61, 67, bias=False, device=device)
    given = config.optimizer.model_copy(update={"layer_decay": None, "backbone_lr_scale": 1.0})  # for a weight alone
    optimizer = build_optimizer(config.model_copy(update={"optimizer": given}), small, 1)
    small.weight.grad = torch.zeros_like(small.weight)
    try:
        optimizer.step()
    except RuntimeError:
        return OPTIMIZERS["adamw"]
    return math.ceil(sum(held.nbytes for held in tensors(dict(optimizer.state))) / small.weight.nbytes - 0.1)
