"""A net under a budget chooses its memory modes itself, at its first training forward, when it sees its input."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revnets.config.memory_budget import BudgetSpec, parse_budget
from revnets.engine.autocast import outside_of_autocast
from revnets.engine.columns import find_columns
from revnets.engine.executor import is_transformed
from revnets.memory.planner import Plan, PlanError, plan_module

logger = logging.getLogger(__name__)


def keep_budget(model: nn.Module, budget: BudgetSpec | int | str) -> None:
    """Let a model choose memory modes that keep a training step under a budget, once it knows its input.

    At the first forward in training mode the step is simulated on fake tensors with the shape, dtype and autocast of
    that forward, as `revnets.plan` does. `columns.memory` and `columns.stored` are set to the least work that fits,
    and the logger `revnets.memory.auto_budget` says so. Setting `columns.memory` before gives the budget up.

    The first input should be the largest. A warning tells of larger ones later.

    Args:
        model: contains reversible columns, see `revnets.engine.columns.find_columns`; its forward is the one looked at.
        budget: bytes, text such as `24GiB`, a memory mode, whose peak is meant, or a `BudgetSpec`.

    Raises:
        ValueError: the budget is no amount of memory.
        PlanError: at the first forward, if nothing fits; says what the least is, and which dial to turn.
    """
    spec = budget if isinstance(budget, BudgetSpec) else BudgetSpec(budget=parse_budget(budget))
    find_columns(model).budget = spec
    if _turn not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_turn, with_kwargs=True)


@torch._disable_dynamo()  # as torch.compiler.disable, but does not import Dynamo, which takes a second, until it runs
def _turn(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The hook: plan if a budget is waiting."""
    if not (model.training and torch.is_grad_enabled()) or is_transformed():
        return  # nothing is kept for backward, or all of it
    columns = find_columns(model)
    if columns.budget is None:
        _compare(model, args, kwargs)
        return
    inputs = inspect.signature(model.forward).bind(*args, **kwargs).args
    plan = _plan(model, inputs, columns.budget)
    plan.apply(model)
    model.memory_plan = plan  # type: ignore[assignment]  # a plain attribute, as on any module
    if not _is_distributed() or torch.distributed.get_rank() == 0:
        logger.warning("input %s, %s: %s", " x ".join(map(str, plan.input_shape)), plan.dtype, plan.sentence)


def _plan(model: nn.Module, inputs: tuple[Any, ...], budget: BudgetSpec) -> Plan:
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    is_sharded = any(hasattr(parameter, "to_local") for parameter in model.parameters())
    world = torch.distributed.get_world_size() if _is_distributed() else 1

    def found() -> Plan:
        return plan_module(
            _whole(model) if is_sharded else model,
            inputs,
            dtype=dtype,
            optimizer=budget.optimizer,
            ranks=budget.ranks or world,
            sharding=budget.sharding or ("fsdp" if is_sharded else "ddp"),
            grad_accum=budget.grad_accum,
            budget=parse_budget(budget.budget),
            modes=(),
        )

    unhooked = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # the caller's see no fake tensors
    with outside_of_autocast(), torch.random.fork_rng(devices=[]), unhooked:
        return _least_of_all_ranks(found) if is_sharded and world > 1 else found()


def _whole(model: nn.Module) -> nn.Module:
    """A twin of a model whose weights are sharded and cannot be copied."""
    twin = getattr(model, "twin", None)
    if twin is None:
        raise PlanError(
            f"the weights of {type(model).__name__} are sharded already, so its step cannot be simulated; before "
            "fully_shard, call revnets.plan(model, input_shape, ranks=..., sharding='fsdp', budget=...).apply(model)",
            "model",
            code="weights-sharded",
        )
    return twin()


def _least_of_all_ranks(found: Any) -> Plan:
    """Sharded ranks gather weights together in backward, so all must replay the same cells: those of the poorest."""
    mine: Plan | PlanError
    try:
        mine = found()
    except PlanError as error:
        mine = error
    outcomes: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(outcomes, mine)
    for outcome in outcomes:
        if isinstance(outcome, PlanError):
            raise outcome
    return max(outcomes, key=lambda plan: plan.chosen.extra)


def _compare(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Warn of an input that the plan in force has not seen."""
    plan = getattr(model, "memory_plan", None)
    columns = find_columns(model)
    if plan is None:
        return
    chosen = plan.chosen
    if (list(columns.memory), columns.stored) != (chosen.memory(columns.graph.columns), set(chosen.stored)):
        return  # somebody has set another mode since
    shape = next((tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), ())
    if math.prod(shape) > math.prod(plan.input_shape):
        warnings.warn(
            f"the memory plan was made for an input of {plan.input_shape}; larger ones, such as {shape}, may need "
            "more than the budget. Begin with the largest, or call revnets.keep_budget again",
            stacklevel=2,
        )


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
