"""What is computed: x_t = F_t(reads) + gamma_t * x_{t-m}, and nothing about how it is differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revnets.engine.errors import ArgumentError

Couple = Callable[[Tensor, "Tensor | float"], Tensor]
"""(F_t(reads), gamma_t) -> x_t. Whoever calls a cell brings x_{t-m} along inside of it."""


class Gain(nn.Module):
    """The learnable per-channel scale gamma of x_{t-m}, never nearer to 0 than `min_abs` (RevCol, section 2.2.2).

    The bound belongs to the parametrisation: `weight` is free, gamma = sign(weight) * max(|weight|, min_abs), with
    sign(0) = +1. The gradient passes straight through, so a weight that has fallen inside the bound can leave it.

    Shape: `weight` is (dim,); channels are the last axis of every state.
    """

    def __init__(self, dim: int, init: float = 0.5, min_abs: float = 1e-3):
        super().__init__()
        if min_abs <= 0:
            text = f"min_abs = {min_abs}: the bound of |gamma| must be positive, or nothing can be inverted"
            raise ArgumentError(text, "min_abs", code="out-of-range")
        self.init, self.min_abs = float(init), min_abs
        self.weight = nn.Parameter(torch.full((dim,), self.init))

    def forward(self) -> Tensor:
        weight = self.weight
        fixed = weight.detach()
        magnitude = fixed.abs().clamp_min(self.min_abs)
        bounded = torch.where(fixed < 0, -magnitude, magnitude)  # copysign has no counterpart in ONNX
        return bounded + (weight - fixed)  # weight - fixed is exactly 0 and carries the gradient

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, min_abs={self.min_abs}"


class FixedGain(nn.Module):
    """A gain that is not learned: RevNet, RevViT and Reformer have gamma = 1."""

    def __init__(self, value: float = 1.0):
        super().__init__()
        if value == 0:
            raise ArgumentError("gain 0 cannot be inverted; give any other number", "value", code="out-of-range")
        self.value = float(value)

    def forward(self) -> float:
        return self.value

    def extra_repr(self) -> str:
        return f"{self.value}"


class Cell(nn.Module):
    """One step of the sequence: `function` computes F_t from its reads, `gain` gives gamma_t.

    A cell of the first column has no x_{t-m} and therefore no gain. The caller decides how F_t and x_{t-m} meet by
    the `couple` it passes (plain forward, forward that keeps the lost bits, inverse), so one `__call__` serves all
    three and the hooks of FSDP2, DDP and others fire in each of them.
    """

    def __init__(self, function: nn.Module, gain: Gain | FixedGain | None):
        super().__init__()
        self.function = function
        self.gain = gain

    def forward(self, *reads: Tensor, couple: Couple | None = None, **context: Any) -> Tensor:
        update = self.function(*reads, **context)
        if couple is None:
            return first_state(update)
        if self.gain is None:
            text = "a cell without a gain is in the first column and has no x_{t-m} to couple with"
            raise ArgumentError(text, "couple", code="conflicting-values")
        return couple(update, self.gain())

    def gamma(self) -> Tensor | float:
        """gamma_t as it is now; 1 for a cell of the first column."""
        return 1.0 if self.gain is None else self.gain()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile F_t. The coupling differs from pass to pass and stays outside of the compiled code."""
        self.function.compile(*args, **kwargs)  # pyright: ignore[reportUnknownMemberType]


def first_state(update: Tensor) -> Tensor:
    """A state of the first column from F_t alone.

    Under autocast F_t may come in half precision; states stay in float32, as they do in the later columns, where
    gamma and x_{t-m} lift them. A state is dense: a slice or an expanded tensor is copied, so that a rebuilt state
    can be written with the same strides.
    """
    kind = update.device.type  # "meta", for one, knows no autocast
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        update = update.to(torch.promote_types(update.dtype, torch.float32))
    return update if torch.compiler.is_compiling() or _is_dense(update) else update.contiguous()


def _is_dense(tensor: Tensor) -> bool:
    """Do the elements fill their stretch of memory without gaps and overlaps, in whatever order of axes?"""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
