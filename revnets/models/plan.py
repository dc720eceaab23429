"""The memory of a training step of any net, predicted without building it: `revnets.plan`."""

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
    """Predict the memory of a training step in each mode; under a budget, choose the fastest that fits.

    Args:
        model_or_spec: a module with reversible columns (also on the meta device), a YAML file, dict or
            spec, or a model's name such as timm's `revcol_tiny` (`revnets.models.loading.load_model`).
        input_shape: shape of one rank's input, batch first; or an example, of which only shape and dtype matter.
        dtype: float32; bfloat16 or float16 mean autocast with float32 weights.
        optimizer: which states to count, one of `revnets.config.memory_budget.OPTIMIZERS`, or how many tensors of a
            weight's size.
        ranks: processes; with more than one, what `sharding` holds to communicate is counted.
        sharding: `ddp` (replicas), or `fsdp` (`fully_shard` on every cell).
        grad_accum: forward passes per update. With several, gradients of the earlier ones are there all along.
        budget: bytes, text such as `24GiB`, or a memory mode, whose peak is meant; `Plan.chosen` is the choice.
        host: bytes of host memory that cells may use besides, or text such as `64GiB`; needs a budget.
        link: bytes a second between device and host, or text such as `25GB/s`.
        flops: operations a second that the device reaches, or text such as `300TFLOP/s`; by default those that it
            reaches in a matrix product, on a device of this machine if the model lies on none.
        trust: may a YAML file, dict or spec name classes of other projects? They are imported and called.

    Raises:
        PlanError: nothing fits the budget (the message says what the least is and what to change), or a value cannot
            be used.
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
