"""A net under a budget chooses its memory modes itself, at its first training forward, when it sees its input."""

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
    """Let a model choose memory modes that keep a training step under a budget, once it knows its input.

    At the first forward in training mode the step is simulated on fake tensors with the shape, dtype and autocast of
    that forward, as `revnets.plan` does. `columns.memory`, `stored`, `kept` and `offloaded` are set to the least work
    that fits, and the logger `revnets.memory.auto_budget` says so. Setting `columns.memory` before gives the budget up.

    The plan is made when the model itself is called, or a method of it that `plan_on_call` decorates. Where neither
    is, the columns warn that the budget is still pending.

    The first input should be the largest. A warning tells of larger ones later.

    Args:
        model: contains reversible columns, see `revnets.find_columns`; its forward is the one looked at.
        budget: bytes, text such as `24GiB`, a memory mode, whose peak is meant, or a `BudgetSpec`.

    Raises:
        ValueError: the budget is no amount of memory.
        PlanError: at the first forward, if nothing fits; says what the least is, and what to change.
    """
    spec = BudgetSpec(budget=parse_budget(budget)) if isinstance(budget, int | str) else budget
    find_columns(model).budget = spec
    if _before_call not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_before_call, with_kwargs=True)


def forget_budget(model: nn.Module) -> None:
    """Take back what `keep_budget` did to a model, planned or pending, where its columns are about to go."""
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
    """Decorate a method of a model through which it is trained as well, such as timm's `forward_features`.

    A pending budget is planned there as at a call of the model itself, for the step that this method begins.
    """
    name = method.__name__

    @wraps(method)
    def entry(model: Host, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if model.training and torch.is_grad_enabled() and _concerns(model, name):
            _prepare(model, name, args, kwargs)
        return method(model, *args, **kwargs)

    return entry


def _concerns(model: nn.Module, entry: str) -> bool:
    """Is there a plan to make at this entry, or to compare with? Cheap, for it is traced by compilers."""
    return find_columns(model).budget is not None or getattr(model, "_planned_entry", None) == entry


def _before_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The hook: plan for the forward."""
    _prepare(model, "forward", args, kwargs)


@torch._disable_dynamo()  # as torch.compiler.disable, but does not import Dynamo, which takes a second, until it runs
def _prepare(model: nn.Module, entry: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Plan for a call of the method `entry` if a budget is pending."""
    if not (model.training and torch.is_grad_enabled()) or is_transformed():
        return  # nothing is kept for backward, or all of it
    columns = find_columns(model)
    if columns.budget is None:
        if getattr(model, "_planned_entry", entry) == entry:  # others are called inside of it, or do with less
            _compare(model, args, kwargs)
        return
    if any(isinstance(value, torch.fx.Proxy) for value in (*args, *kwargs.values())):
        return  # a symbolic trace computes nothing
    call = inspect.signature(getattr(model, entry)).bind(*args, **kwargs)
    call.apply_defaults()  # or `args` would end before the first argument that is left out
    plan = _plan(model, entry, call.args, call.kwargs, columns.budget)
    plan.apply(model)
    model.memory_plan = plan  # type: ignore[assignment]  # a plain attribute, as on any module
    model._planned_entry = entry  # type: ignore[assignment]
    if not _is_distributed() or torch.distributed.get_rank() == 0:
        logger.warning("input %s, %s: %s", " x ".join(map(str, plan.input_shape)), plan.dtype, plan.sentence)


class _Entry(nn.Module):
    """A model whose forward is another method of it, or is called with keyword arguments besides its inputs."""

    def __init__(self, model: nn.Module, method: str, keywords: Mapping[str, Any]):
        super().__init__()
        self.model, self.method = model, method
        self.names = list(keywords)
        for name, value in keywords.items():  # attributes, for the simulation looks for tensors there
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
            modes=(Memory.STORE,),  # how ranks compare
        )

    unhooked = saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)  # the caller's see no fake tensors
    with outside_of_autocast(), torch.random.fork_rng(devices=[]), unhooked:
        is_common = world > 1 and (is_sharded or (budget.ranks or world) == world)
        return _least_of_all_ranks(found) if is_common else found()


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
    """Ranks that train together replay the same cells: those of the poorest.

    A replay may communicate: it gathers weights that are sharded, and repeats collectives inside of a cell.
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
    """The plan of the rank whose step exceeds its budget the most if it keeps everything.

    Extra work alone does not tell: copies to the host may hide behind the cells and cost none.
    """

    def need(plan: Plan) -> tuple[float, float]:
        assert plan.budget is not None  # a pending budget is planned for
        assert plan.chosen is not None
        return plan.modes[0].peak / plan.budget, plan.chosen.extra

    return max(plans, key=need)


def _compare(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Warn of an input that the plan in force has not seen."""
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
