"""Are gradients the same, bit for bit, in every memory mode, in the surroundings in which GPUs train?

Each check runs a step in `store` twice, and in each other mode once, from the same weights and random numbers. Where
`store` does not repeat itself (kernels with atomic additions), ten times its own difference is granted, as an audit
does; elsewhere `recompute` and `exact` must give equal bits. The error of `invert` is measured and not judged: under
autocast it is expected to drift.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from gpu_device import Device, Run
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import revnets
from revnets.analysis.gradient_distance import gradient_distance, same_bits
from revnets.memory.tracker import tensors

MODES = ("recompute", "exact", "invert")


def image_net(device: Device, drop_path: float = 0.0, columns: int = 5) -> nn.Module:
    """Columns of ConvNeXt blocks, as RevCol's."""
    levels = [{"dim": 16 * 2**level, "depth": 2, "block": "convnext"} for level in range(4)]
    spec: dict[str, Any] = {"columns": columns, "stem": {"type": "patchify"}, "levels": levels}
    spec |= {"head": {"type": "classifier", "num_classes": 11}, "drop_path": drop_path}
    return revnets.build(spec).to(device.name)


def token_net(device: Device, dropout: float = 0.0) -> nn.Module:
    """Columns of transformer blocks."""
    levels = [{"dim": 64, "depth": 1, "block": "vit", "heads": 2}] * 3
    spec: dict[str, Any] = {"columns": 4, "stem": {"type": "tokens", "img_size": 64, "patch": 8}, "levels": levels}
    spec |= {"fusion": "linear", "drop_path": dropout, "head": {"type": "classifier", "num_classes": 11}}
    return revnets.build(spec).to(device.name)


class NormNet(nn.Module):
    """Convolutions with BatchNorm and dropout, as cells of a RevNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.columns = revnets.ReversibleSequence([self.block() for _ in range(8)])

    @staticmethod
    def block() -> nn.Module:
        return nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.1))

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.columns(self.stem(images))


def rewired_net(device: Device) -> nn.Module:
    import timm

    shape = {"img_size": 64, "embed_dim": 64, "depth": 6, "num_heads": 2, "num_classes": 11, "drop_path_rate": 0.1}
    model = timm.create_model("vit_tiny_patch16_224", **shape).to(device.name)
    revnets.make_reversible(model, blend=0.1)
    return model


class Check(NamedTuple):
    """A net in a surrounding."""

    build: Callable[[Device], nn.Module]
    around: Callable[[Device], AbstractContextManager[Any]] = lambda _: nullcontext()
    prepare: Callable[[nn.Module, Device], None] = lambda model, device: None
    layout: torch.memory_format = torch.contiguous_format


def autocast(dtype: torch.dtype) -> Callable[[Device], AbstractContextManager[Any]]:
    return lambda device: torch.autocast(device.type, dtype)


def attention(backend: SDPBackend, dtype: torch.dtype = torch.bfloat16) -> Callable[[Device], Any]:
    @contextlib.contextmanager
    def around(device: Device) -> Iterator[None]:
        with sdpa_kernel(backend), torch.autocast(device.type, dtype):
            yield

    return around


def compiled(model: nn.Module, device: Device) -> None:
    """On the CPU with eager kernels: the default backend would wait for a C++ compiler."""
    revnets.find_columns(model)[0].compile(backend="inductor" if device.is_cuda else "aot_eager")


def in_channels_last(model: nn.Module, device: Device) -> None:
    model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


DROPS = partial(image_net, drop_path=0.3)

CHECKS = {
    "float32": Check(image_net),
    "random numbers": Check(DROPS),
    "autocast bfloat16": Check(DROPS, autocast(torch.bfloat16)),
    "autocast float16": Check(DROPS, autocast(torch.float16)),
    "channels_last": Check(image_net, prepare=in_channels_last, layout=torch.channels_last),
    "BatchNorm and dropout": Check(lambda device: NormNet().to(device.name)),
    "rewired ViT": Check(rewired_net, autocast(torch.bfloat16)),
    "attention, flash": Check(token_net, attention(SDPBackend.FLASH_ATTENTION)),
    "attention, efficient": Check(token_net, attention(SDPBackend.EFFICIENT_ATTENTION)),
    "attention, cuDNN": Check(token_net, attention(SDPBackend.CUDNN_ATTENTION)),
    "attention, math": Check(partial(token_net, dropout=0.2), attention(SDPBackend.MATH)),
    "compiled cells": Check(partial(image_net, columns=3), autocast(torch.bfloat16), compiled),
}
"""By what is checked. The slowest one comes last."""

ONLY_CUDA = ("attention, efficient", "attention, cuDNN")


class Outcome(NamedTuple):
    """Of one step."""

    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def outcome(check: Check, device: Device, mode: str, batch: int) -> Outcome:
    """Gradients of all parameters, and the buffers after the step, of a net built anew."""
    torch.manual_seed(0)
    model = check.build(device).train()
    check.prepare(model, device)
    revnets.find_columns(model).memory = mode
    images = torch.randn(batch, 3, 64, 64).to(device.name, memory_format=check.layout)
    torch.manual_seed(1)
    with check.around(device):
        outputs = [output for output in tensors(model(images)) if output.requires_grad]
        weights = [torch.randn(output.shape).to(output.device, output.dtype) for output in outputs]
        loss = torch.stack([(weight * output).float().sum() for weight, output in zip(weights, outputs, strict=True)])
    loss.sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Outcome(gradients, {name: buffer.clone() for name, buffer in model.named_buffers()})


def found(check: Check, device: Device, batch: int) -> dict[str, Any]:
    """By mode: is every bit equal, the error, and whether that is right."""
    repeatable = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with warnings.catch_warnings(), repeatable:
        warnings.simplefilter("ignore", revnets.DriftWarning)  # it is measured here
        reference = outcome(check, device, "store", batch)
        noise = gradient_distance(outcome(check, device, "store", batch).gradients, reference.gradients).relative
        rows = {}
        for mode in MODES:
            now = outcome(check, device, mode, batch)
            apart = gradient_distance(now.gradients, reference.gradients)
            same = all(same_bits(buffer, reference.buffers[name]) for name, buffer in now.buffers.items())
            rows[mode] = {
                "equal": apart.equal,
                "error": _plain(apart.relative),
                "buffers_equal": same,
                "right": None if mode == "invert" else apart.relative <= 10 * noise and (same or noise > 0),
            }
    return {"noise": _plain(noise), "modes": rows, "right": all(row["right"] is not False for row in rows.values())}


def _plain(error: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return error if math.isfinite(error) else str(error)


def run_checks(run: Run, batch: int, names: tuple[str, ...] = tuple(CHECKS)) -> None:
    """Add the section `checks`."""
    for name in names:
        if name in ONLY_CUDA and not run.device.is_cuda:
            continue
        run.measure("checks", {"check": name}, partial(found, CHECKS[name], run.device, batch))
