"""Memory estimates and plans of a training step, without allocating the model: `revnets.plan`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from revnets.config.loader import Source
from revnets.config.memory_budget import host_memory, parse_budget
from revnets.config.net_spec import NetSpec
from revnets.engine.memory_mode import Memory
from revnets.memory.planner import Plan as Plan
from revnets.memory.planner import PlanError as PlanError
from revnets.memory.planner import Prediction as Prediction
from revnets.memory.planner import plan_module
from revnets.models.loading import load_model


def plan(
    model_or_spec: nn.Module | NetSpec | Source,
    input_shape: Sequence[int] | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str | int = "adamw",
    ranks: int = 1,
    sharding: str = "ddp",
    grad_accum: int = 1,
    budget: int | str | None = None,
    host: int | str | None = None,
    link: int | str = "25GB/s",
    flops: float | str | None = None,
    modes: Sequence[str] = tuple(Memory),
    trust: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Estimate the memory of a training step in each memory mode, and choose the fastest plan under a budget.

    Args:
        model_or_spec: A module with reversible columns (also on the meta device), a YAML file, dict or
            spec, or the name of a model such as timm's `revcol_tiny` (`revnets.models.loading.load_model`).
        input_shape: Shape of the input of one rank, batch first; or an example, of which only shape and dtype matter.
        dtype: float32; bfloat16 or float16 mean autocast with float32 weights.
        optimizer: Optimizer whose states are counted, one of `revnets.config.memory_budget.OPTIMIZERS`, or the number
            of state tensors per weight.
        ranks: Number of processes. With more than one, communication buffers of `sharding` are counted.
        sharding: `ddp` (replicas), or `fsdp` (`fully_shard` on every cell).
        grad_accum: Forward passes per update. With several, gradients stay allocated throughout the step.
        budget: Number of bytes, text such as `24GiB`, or a memory mode, whose peak is the budget. `Plan.chosen` is
            the chosen plan.
        host: Additional host memory for cells in bytes, or text such as `64GiB`; requires a budget.
        link: Bandwidth between device and host in bytes per second, or text such as `25GB/s`.
        flops: FLOPs per second of the device, or text such as `300TFLOP/s`. By default measured in a matrix product, on
            a device of this machine if the model is on the meta device.
        modes: Memory modes to estimate.
        trust: Whether a YAML file, dict or spec may name classes of other projects, which are imported and called.
        progress: Called with a description of each step of the computation.

    Returns:
        The estimates of all modes and, under a budget, the chosen plan.

    Raises:
        PlanError: If no plan fits the budget (the message states the minimum and what to change), or a value is
            invalid.

    Example:
        >>> plan = revnets.plan(net, (32, 16), budget="exact")
        >>> plan.apply(net)
    """
    try:
        limit = None if budget is None else parse_budget(budget)
        hosted = host_memory(host, link, flops)
    except ArgumentError as error:
        raise PlanError(f"{error.key} {error}", error.key, error.code) from None
    if isinstance(model_or_spec, nn.Module):
        model = model_or_spec
    else:
        with torch.device("meta"):
            model = load_model(model_or_spec, trust=trust)
    example = input_shape if isinstance(input_shape, Tensor) else torch.empty(tuple(input_shape), device="meta")
    return plan_module(
        model,
        (example,),
        dtype=dtype,
        optimizer=optimizer,
        ranks=ranks,
        sharding=sharding,
        grad_accum=grad_accum,
        budget=limit,
        host=hosted,
        modes=modes,
        progress=progress,
    )
