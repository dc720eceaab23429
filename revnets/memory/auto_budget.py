"""Automatic memory planning: a model with a budget chooses its memory modes at its first training forward pass."""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revnets.config.memory_budget import BudgetSpec, host_memory, parse_budget
from revnets.engine.budget import Budget
from revnets.engine.columns_group import ColumnsGroup, find_columns
from revnets.engine.executor import is_transformed
from revnets.engine.memory_mode import Memory
from revnets.engine.replay.replay_context import outside_of_autocast
from revnets.memory.planner import Plan, PlanError, plan_module

logger = logging.getLogger(__name__)


def keep_budget(model: nn.Module, budget: Budget | int | str) -> None:
    """Plan memory at the first training forward pass so that the step stays within a budget.

    The first forward pass in training mode simulates the step on fake tensors with the same shapes, dtypes and
    autocast state, as `revnets.plan` does. It then sets `columns.memory`, `stored`, `kept`, `offloaded` and `products`
    to the choice with the least compute that fits, and logs it to `revnets.memory.auto_budget`. Setting
    `columns.memory` before that cancels the budget.

    The plan is made when the model itself or a method decorated with `plan_on_call` is called. If only other methods
    are called, the columns warn that the budget is still pending.

    Pass the largest input first. A larger input later raises a warning.

    Args:
        model: Module that contains reversible columns, see `revnets.find_columns`. Its forward pass is simulated.
        budget: Bytes, text such as `24GiB`, a memory mode (its peak is the budget), or a `BudgetSpec`.

    Raises:
        ValueError: If `budget` is not an amount of memory.
        PlanError: At the first forward pass, if nothing fits. The message contains the smallest possible peak.
    """
    spec = BudgetSpec(budget=parse_budget(budget)) if isinstance(budget, int | str) else budget
    find_columns(model).budget = spec
    if _before_call not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_call, with_kwargs=True)


def forget_budget(model: nn.Module) -> None:
    """Remove the hook and the plan that `keep_budget` added to a model, for example before its columns are removed."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is _before_call:
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
    for name in ("memory_plan", "_planned_entry"):
        model.__dict__.pop(name, None)


Host = TypeVar("Host", bound=nn.Module)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def plan_on_call(
    method: Callable[Concatenate[Host, Arguments], Result],
) -> Callable[Concatenate[Host, Arguments], Result]:
    """Decorate a method that training may call instead of the model itself, such as timm's `forward_features`.

    A call of the method makes the pending memory plan, as a call of the model does.

    Args:
        method: Method of a model with reversible columns.

    Returns:
        The decorated method.
    """
    name = method.__name__

    @wraps(method)
    def entry(model: Host, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if model.training and torch.is_grad_enabled() and _concerns(model, name):
            _prepare(model, name, args, kwargs)
        return method(model, *args, **kwargs)

    return entry


def _concerns(model: nn.Module, entry: str) -> bool:
    """Whether a call of this method makes a plan or is compared with one. Cheap, because compilers trace it."""
    return find_columns(model).budget is not None or getattr(model, "_planned_entry", None) == entry


def _before_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Forward pre-hook: make the plan for `forward`."""
    _prepare(model, "forward", args, kwargs)


@torch._disable_dynamo()  # like torch.compiler.disable, but imports Dynamo, which takes a second, only when it runs
def _prepare(model: nn.Module, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Make the plan for a call of the method `entry` if a budget is pending."""
    if not (model.training and torch.is_grad_enabled()) or is_transformed():
        return  # either nothing or everything is saved for backward
    columns = find_columns(model)
    if columns.budget is None:
        if getattr(model, "_planned_entry", entry) == entry:
            _compare(model, args, kwargs)
        return  # any other method is called inside the planned one, or needs less memory
    if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
        return  # symbolic tracing computes nothing
    call = inspect.signature(getattr(model, entry)).bind(*args, **kwargs)
    call.apply_defaults()  # otherwise `args` would end before the first omitted argument
    plan = _plan(model, entry, call.args, call.kwargs, columns.budget)
    plan.apply(model)
    model.memory_plan = plan  # type: ignore[assignment]  # a plain attribute, as on any module
    model._planned_entry = entry  # type: ignore[assignment]
    if not _is_distributed() or torch.distributed.get_rank() == 0:
        logger.warning("input %s, %s: %s", " x ".join(map(str, plan.input_shape)), plan.dtype, plan.sentence)


class _Entry(nn.Module):
    """A wrapper whose forward pass calls a given method of a model with fixed keyword arguments."""

    def __init__(self, model: nn.Module, method: str, keywords: Mapping[str, Any]):
        super().__init__()
        self.model, self.method = model, method
        self.names = list(keywords)
        for name, value in keywords.items():  # as attributes, where the simulation searches for tensors
            setattr(self, f"keyword_{name}", value)

    @property
    def columns(self) -> ColumnsGroup:
        return find_columns(self.model)

    def forward(self, *inputs: Any) -> Any:
        keywords = {name: getattr(self, f"keyword_{name}") for name in self.names}
        return getattr(self.model, self.method)(*inputs, **keywords)


def _plan(model: nn.Module, entry: str, inputs: tuple[Any, ...], keywords: Mapping[str, Any], budget: Budget) -> Plan:
    device = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    is_sharded = any(hasattr(parameter, "to_local") for parameter in model.parameters())
    world = torch.distributed.get_world_size() if _is_distributed() else 1

    def found() -> Plan:
        whole = _whole(model) if is_sharded else model
        return plan_module(
            _Entry(whole, entry, keywords) if keywords or entry != "forward" else whole,
            inputs,
            dtype=dtype,
            optimizer=budget.optimizer,
            ranks=budget.ranks or world,
            sharding=budget.sharding or ("fsdp" if is_sharded else "ddp"),
            grad_accum=budget.grad_accum,
            budget=parse_budget(budget.budget),
            host=host_memory(budget.host, budget.link, budget.flops),
            modes=(Memory.STORE,),  # `_poorest` compares ranks by this mode
        )

    # Hooks of the caller must not see fake tensors.
    unhooked = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with outside_of_autocast(), torch.random.fork_rng(devices=[]), unhooked:
        is_common = world > 1 and (is_sharded or (budget.ranks or world) == world)
        return _least_of_all_ranks(found) if is_common else found()


def _whole(model: nn.Module) -> nn.Module:
    """Return an unsharded copy of a model with sharded weights, from its method `twin`."""
    twin = getattr(model, "twin", None)
    if twin is None:
        raise PlanError(
            f"the weights of {type(model).__name__} are already sharded, so its step cannot be simulated; call "
            "revnets.plan(model, input_shape, ranks=..., sharding='fsdp', budget=...).apply(model) before fully_shard",
            "model",
            code="weights-sharded",
        )
    return twin()


def _least_of_all_ranks(found: Any) -> Plan:
    """Return the same plan on all ranks that train together: that of the rank with the tightest budget.

    All ranks must replay the same cells, because a replay gathers sharded weights and repeats the collectives of a
    cell.
    """
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
    return _poorest(outcomes)


def _poorest(plans: list[Plan]) -> Plan:
    """Return the plan of the rank whose peak in mode `store` exceeds its budget the most.

    The extra compute of the plans does not decide this: copies to host memory may overlap with cells and cost nothing.
    """

    def need(plan: Plan) -> tuple[float, float]:
        assert plan.budget is not None  # these plans are made for a budget
        assert plan.chosen is not None
        return plan.modes[0].peak / plan.budget, plan.chosen.extra

    return max(plans, key=need)


def _compare(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Warn about an input that is larger than that of the current plan."""
    plan = getattr(model, "memory_plan", None)
    columns = find_columns(model)
    if plan is None:
        return
    chosen = plan.chosen
    planned = (
        chosen.memory(columns.column_count),
        set(chosen.stored),
        dict(chosen.kept_cells),
        set(chosen.offloaded),
        dict(chosen.products),
    )
    present = list(columns.memory), columns.stored, columns.kept, columns.offloaded, columns.products
    if present != planned:
        return  # the memory modes have been changed since the plan was applied
    shape = next((tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), ())
    if math.prod(shape) > math.prod(plan.input_shape):
        warnings.warn(
            f"the memory plan is for an input of shape {plan.input_shape}; an input of shape {shape} may exceed the "
            "budget. Pass the largest input first, or call revnets.keep_budget again",
            stacklevel=2,
        )


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
