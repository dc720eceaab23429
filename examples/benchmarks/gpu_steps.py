"""Memory and time of whole training steps: the plan against the device, memory by columns, and ways to train.

All weights are float32; nets run under autocast in bfloat16, except for the columns of the paper's figure 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from finetuning_ways import PRODUCTS, CheckpointedBlocks
from gpu_device import Device, Run, median
from official_columns import OfficialColumns
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from training_step import CheckpointedColumns, columns_net

import revnets
from revnets.memory.simulation import total
from revnets.models.example_inputs import example_input


class Model(NamedTuple):
    """A net, and a shape of its input without the batch."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int


def _timm(name: str, blend: float | None = None, **options: Any) -> nn.Module:
    import timm

    import vision  # noqa: F401  # its models join timm's

    model = timm.create_model(name, **options)
    if blend is not None:
        revnets.make_reversible(model, blend=blend)
    return model


def _gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(bos_token_id=0, eos_token_id=0, use_cache=False, **options)
    model = GPT2LMHeadModel(config)
    revnets.make_reversible(model, blend=0.1)
    return model


IMAGE = (3, 224, 224)
MODELS = {
    "revcol_tiny": Model(partial(_timm, "revcol_tiny"), IMAGE, 64),
    "revcol_base": Model(partial(_timm, "revcol_base"), IMAGE, 64),
    "revcol_vit_small": Model(partial(_timm, "revcol_vit_small"), IMAGE, 64),
    "vit_base, rewired": Model(partial(_timm, "vit_base_patch16_224", 0.1), IMAGE, 64),
    "swin_tiny, rewired": Model(partial(_timm, "swin_tiny_patch4_window7_224", 0.1), IMAGE, 64),
    "GPT-2, rewired": Model(partial(_gpt2, n_layer=12), (512,), 8),
}
SMALL_MODELS = {
    "test_revcol": Model(partial(_timm, "test_revcol"), (3, 32, 32), 5),
    "vit, rewired": Model(
        partial(_timm, "vit_tiny_patch16_224", 0.1, img_size=32, embed_dim=24, depth=4, num_heads=3), (3, 32, 32), 7
    ),
}


def _step(model: nn.Module, x: Tensor, device: Device, dtype: torch.dtype = torch.bfloat16) -> None:
    """Forward and backward with the loss that the plan assumes; gradients are fresh, and gone before the next one."""
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = total(model(x))
    loss.backward()


def _weights(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def planned_and_measured(model: Model, device: Device, modes: tuple[str, ...]) -> dict[str, Any]:
    """Peaks in each mode as predicted and as the device allocates them, weights included, the input not."""
    torch.manual_seed(0)
    net = model.build().train().to(device.name)
    x = example_input(net, (model.batch, *model.shape)).to(device.name)
    plan = revnets.plan(net, x, dtype=torch.bfloat16, optimizer="none", modes=modes)
    rows = {}
    for prediction in plan.modes:
        revnets.find_columns(net).memory = prediction.mode
        step = partial(_step, net, x, device)
        step()
        net.zero_grad(set_to_none=True)
        measured = device.peak(step) + _weights(net)
        net.zero_grad(set_to_none=True)
        error = prediction.peak / measured - 1
        rows[prediction.mode] = {"predicted": prediction.peak, "measured": measured, "error": error}
    return {"batch": model.batch, "modes": rows}


def run_plans(run: Run, models: dict[str, Model], modes: tuple[str, ...] = ("store", "exact")) -> None:
    """Add the section `plan`."""
    for name, model in models.items():
        run.measure("plan", {"model": name}, partial(planned_and_measured, model, run.device, modes))


def peak_of_columns(count: int, mode: str, batch: int, size: int, device: Device) -> dict[str, Any]:
    """Peak of a float32 step of columns shaped like RevCol-T, weights and gradients included."""
    torch.manual_seed(0)
    net = columns_net("T", count).to(device.name)
    net.columns.memory = mode
    x = torch.randn(batch, 3, size, size, device=device.name)
    step = partial(_step, net, x, device, torch.float32)
    step()
    net.zero_grad(set_to_none=True)
    return {"peak": device.peak(step) + _weights(net)}


def run_figure(run: Run, counts: tuple[int, ...], batch: int, size: int) -> None:
    """Add the section `figure4`: memory by the number of columns, as in the figure 4 of the paper."""
    for count in counts:
        for mode in ("store", "recompute", "exact"):
            keys = {"columns": count, "mode": mode, "batch": batch, "size": size}
            run.measure("figure4", keys, partial(peak_of_columns, count, mode, batch, size, run.device))


# ----------------------------------------------------------------------------------------- ways to train columns

PLANNED = "budget: exact"

SIZES = {"T": 4, "S": 8, "B": 16}
"""Columns of the RevCol of each size."""


@contextmanager
def _selective(net: Any) -> Iterator[nn.Module]:
    """Results of matrix products and convolutions are kept, all else of a cell is replayed."""
    contexts = partial(create_selective_checkpoint_contexts, PRODUCTS)
    cells = net.columns.flat()
    functions = [cell.function for cell in cells]
    try:
        for cell, function in zip(cells, functions, strict=True):
            cell.function = CheckpointedBlocks([function], context_fn=contexts)
        with net.columns.using(modes="store", stored=0):
            yield net.columns
    finally:
        for cell, function in zip(cells, functions, strict=True):
            cell.function = function


@contextmanager
def _mode(mode: str, net: Any) -> Iterator[nn.Module]:
    with net.columns.using(modes=mode, stored=0):
        yield net.columns


@contextmanager
def _planned(images: Tensor, net: Any) -> Iterator[nn.Module]:
    """`exact` under a budget of its own peak."""
    plan = revnets.plan(net, images, dtype=torch.bfloat16, optimizer="none", modes=(), budget="exact")
    with net.columns.using():
        plan.apply(net)
        yield net.columns


@contextmanager
def _around(kind: Callable[[nn.Module], nn.Module], net: Any) -> Iterator[nn.Module]:
    yield kind(net.columns)


def ways(images: Tensor) -> dict[str, Callable[[Any], Any]]:
    """By name: a context that makes the columns of a net train in this way, and yields what runs them."""
    return {
        "store": partial(_mode, "store"),
        "recompute": partial(_mode, "recompute"),
        "exact": partial(_mode, "exact"),
        PLANNED: partial(_planned, images),
        "official scheme": partial(_around, OfficialColumns),
        "checkpoint columns": partial(_around, CheckpointedColumns),
        "selective": _selective,
    }


WAYS = tuple(ways(torch.empty(0)))


def step_of(size: str, count: int, batch: int, side: int, way: str, rounds: int, device: Device) -> dict[str, Any]:
    """Milliseconds of a training step (forward, backward, SGD) and its peak, weights included."""
    torch.manual_seed(0)
    net = columns_net(size, count).to(device.name)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, foreach=False)
    images = torch.randn(batch, 3, side, side, device=device.name)
    labels = torch.randint(1000, (batch,), device=device.name)

    with ways(images)[way](net) as columns:

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(net.head(columns(net.stem(images))), labels)
            loss.backward()
            optimizer.step()

        for _ in range(3 if device.is_cuda else 1):
            step()
        times = device.milliseconds(step, rounds)
        optimizer.zero_grad(set_to_none=True)
        peak = device.peak(step) + _weights(net)
    return {"milliseconds": median(times), "range": [min(times), max(times)], "peak": peak}


def run_steps(
    run: Run, sizes: dict[str, int], batches: tuple[int, ...], side: int, rounds: int, names: tuple[str, ...] = WAYS
) -> None:
    """Add the section `steps`. What needs a plan, which takes longer than the steps, comes last."""
    first = [name for name in names if name != PLANNED]
    for group in (first, [name for name in names if name == PLANNED]):
        for batch in batches:
            for size, count in sizes.items():
                for way in group:
                    keys = {"size": size, "columns": count, "batch": batch, "way": way}
                    run.measure("steps", keys, partial(step_of, size, count, batch, side, way, rounds, run.device))
