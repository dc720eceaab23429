"""Memory budget of a training run: chooses which cells to store so that the whole run stays within the budget."""

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
    """Choose the memory mode of a run with a budget.

    This must be done before weights are sharded. The plan is for the shape of the training batch.

    Args:
        config: Of the run.
        model: Of the run.
        shape: Of one sample; None if samples have different shapes.
        world: The processes of the run.

    Returns:
        A description of the plan; None without a budget.

    Raises:
        revnets.SpecError: If no plan fits the budget.
    """
    columns = columns_of(model)
    budget = config.memory if isinstance(config.memory, BudgetSpec) else columns.budget if columns else None
    if not isinstance(budget, BudgetSpec) or columns is None:
        return None
    if shape is None:
        problem = "samples of this task have no fixed shape, which a memory plan needs"
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
            "memory.budget", first_line(error), "Reduce batch_size, or raise the budget", code="over-budget"
        ) from None
    chosen.apply(model)
    return chosen.sentence


def optimizer_states(config: TrainConfig, device: torch.device | str = "cpu") -> int:
    """Number of weight-sized tensors in the state of the run's optimizer, found by a step on a small weight.

    An optimizer whose step needs more than a gradient counts as AdamW.
    """
    small = nn.Linear(61, 67, bias=False, device=device)
    given = config.optimizer.model_copy(
        update={"layer_decay": None, "backbone_lr_scale": 1.0}
    )  # they need a whole model
    optimizer = build_optimizer(config.model_copy(update={"optimizer": given}), small, 1)
    small.weight.grad = torch.zeros_like(small.weight)
    try:
        optimizer.step()
    except RuntimeError:
        return OPTIMIZERS["adamw"]
    return math.ceil(sum(held.nbytes for held in tensors(dict(optimizer.state))) / small.weight.nbytes - 0.1)
