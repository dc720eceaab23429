"""What a cell computes: x_t = F_t(inputs) + gamma_t * x_{t-m}. How it is differentiated is defined elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from revnets.engine.errors import ArgumentError
from revnets.engine.torch_internals import has_autocast

Couple = Callable[[Tensor, "Tensor | float"], Tensor]
"""A coupling (F_t(inputs), gamma_t) -> x_t. The caller of a cell supplies it, and it holds x_{t-m}."""


class Gain(nn.Module):
    """Learnable per-channel scale gamma of x_{t-m}, with |gamma| at least `min_abs` (RevCol, section 2.2.2).

    The bound is part of the parametrization: gamma = sign(weight) * max(|weight|, min_abs), with sign(0) = +1. The
    gradient passes straight through, so a weight inside the bound can leave it.

    Args:
        dim: Number of channels, the last axis of every state.
        init: Initial value of every weight.
        min_abs: Lower bound of |gamma|.

    Attributes:
        weight: Parameter of shape (dim,).

    Raises:
        ArgumentError: `min_abs` is not positive.
    """

    def __init__(self, dim: int, init: float = 0.5, min_abs: float = 1e-3):
        super().__init__()
        if min_abs <= 0:
            text = f"min_abs = {min_abs}: the lower bound of |gamma| must be positive, or no state can be rebuilt"
            raise ArgumentError(text, "min_abs", code="out-of-range")
        self.init, self.min_abs = float(init), min_abs
        self.weight = nn.Parameter(torch.full((dim,), self.init))

    def forward(self) -> Tensor:
        """Return gamma, shape (dim,)."""
        weight = self.weight
        fixed = weight.detach()
        magnitude = fixed.abs().clamp_min(self.min_abs)
        bounded = torch.where(fixed < 0, -magnitude, magnitude)  # copysign has no counterpart in ONNX
        return bounded + (weight - fixed)  # the difference is exactly 0 and carries the gradient

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, min_abs={self.min_abs}"


class FixedGain(nn.Module):
    """A constant gain, such as gamma = 1 in RevNet, RevViT and Reformer.

    Args:
        value: gamma, any number but 0.

    Raises:
        ArgumentError: `value` is 0.
    """

    def __init__(self, value: float = 1.0):
        super().__init__()
        if value == 0:
            raise ArgumentError("a gain of 0 cannot be inverted; give any other number", "value", code="out-of-range")
        self.value = float(value)

    def forward(self) -> float:
        """Return gamma."""
        return self.value

    def extra_repr(self) -> str:
        return f"{self.value}"


class Cell(nn.Module):
    """One step of the sequence: `function` computes F_t from the inputs, `gain` returns gamma_t.

    The caller passes the coupling of F_t and x_{t-m}: a plain forward, a forward that keeps the lost bits, or the
    inverse. All of them go through `__call__`, so the hooks of FSDP2, DDP and other tools run in each.

    Args:
        function: Module F_t; returns a tensor of the shape of x_{t-m}.
        gain: Module that returns gamma_t; None in the first column, which has no x_{t-m}.

    Example:
        >>> cell = revnets.Cell(nn.Linear(8, 8), revnets.Gain(8))
        >>> sequence = revnets.ReversibleSequence([nn.Identity(), nn.Identity(), cell])
    """

    def __init__(self, function: nn.Module, gain: Gain | FixedGain | None):
        super().__init__()
        self.function = function
        self.gain = gain

    def forward(self, *reads: Tensor, couple: Couple | None = None, **context: Any) -> Tensor:
        """Return x_t.

        Args:
            reads: Input states of F_t, in order.
            couple: Computes x_t from F_t and gamma_t; None in the first column.
            context: Keyword arguments of `function`.

        Raises:
            ArgumentError: `couple` is given, but the cell has no gain.
        """
        update = self.function(*reads, **context)
        if couple is None:
            return first_state(update)
        if self.gain is None:
            text = "this cell has no gain, as in the first column, so it has no x_{t-m} to couple with"
            raise ArgumentError(text, "couple", code="conflicting-values")
        return couple(update, self.gain())

    def gamma(self) -> Tensor | float:
        """Return the current gamma_t; 1 for a cell of the first column."""
        return 1.0 if self.gain is None else self.gain()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile `function`. The coupling changes between calls and stays eager.

        Args:
            args: Positional arguments of `torch.compile`.
            kwargs: Keyword arguments of `torch.compile`.
        """
        self.function.compile(*args, **kwargs)  # pyright: ignore[reportUnknownMemberType]


def first_state(update: Tensor) -> Tensor:
    """Return a state of the first column, from F_t alone.

    Under autocast, F_t may be in half precision. It is converted to float32, the dtype that gamma and x_{t-m} give
    states in later columns. A slice or an expanded tensor is copied, because a rebuilt state needs dense strides.
    """
    kind = update.device.type
    if has_autocast(kind) and torch.is_autocast_enabled(kind):
        update = update.to(torch.promote_types(update.dtype, torch.float32))
    return update if torch.compiler.is_compiling() or _is_dense(update) else update.contiguous()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps and overlaps, in any order of axes."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
