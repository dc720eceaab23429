"""Update rules: the published coefficients that combine a trained residual block with the previous states.

A block G(x) = x + f(x) of a network is used in

    x_t = keep * x_{t-1} + scale * f(x_{t-1}) + residual * x_{t-2},        x_{-1} = x_0.

`residual` is gamma in the engine: x_{t-2} = (x_t - F_t) / gamma.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from revnets.engine.cell import Gain
from revnets.engine.errors import ArgumentError

Scalar: TypeAlias = "float | Tensor"


class Coefficients(NamedTuple):
    """Coefficients of x_{t-1}, f(x_{t-1}) and x_{t-2}."""

    keep: Scalar
    scale: Scalar
    residual: Scalar


RULES: dict[str, Callable[[Scalar], Coefficients]] = {
    "blend": lambda b: Coefficients(1.0 - b, 1.0, b),  # the original network at b = 0 (Dr2Net, arXiv 2401.04105)
    "midpoint": lambda h: Coefficients(0.0, 2.0 * h, 1.0),  # Reversing LLMs, arXiv 2512.02056; i-RevNet at h = 1/2
    "leapfrog": lambda h: Coefficients(2.0, h * h, -1.0),  # x'' = f(x), arXiv 2512.02056
    "momentum": lambda g: Coefficients(1.0 + g, 1.0 - g, -g),  # Momentum ResNets, arXiv 2102.07870
    "bdia": lambda g: Coefficients(1.0 - g, 1.0 + g, g),  # BDIA, arXiv 2407.09093; random sign of g in training
    "meft": lambda b: Coefficients(1.0, 1.0, b),  # MEFT, arXiv 2306.00477; without its adapters, which PEFT can add
}
"""Coefficients of each rule as a function of its parameter."""


class Blend(nn.Module):
    """An update rule with its parameter.

    Args:
        value: Parameter of the rule, in (0, 1].
        rule: One of `RULES`.
        learned: Trained parameter that replaces `value`; each block needs its own.

    Raises:
        ArgumentError: If the rule is unknown, the value is outside (0, 1], or the rule does not support learning.
    """

    def __init__(self, value: float, rule: str = "blend", learned: Gain | None = None):
        super().__init__()
        if rule not in RULES:
            text = f"update rule {rule!r} is unknown; choose {', '.join(RULES)}"
            raise ArgumentError(text, "rule", code="unknown-choice")
        if learned is not None and rule == "bdia":
            text = "the parameter of the rule bdia has a random sign and cannot be learned"
            raise ArgumentError(text, "learn_blend", code="conflicting-values")
        self.rule = rule
        self.value = checked_blend(value)
        self.learned = learned

    def forward(self, x: Tensor, is_training: bool, number: float | None = None) -> Coefficients:
        """Return the coefficients for a state.

        In training, `bdia` draws one sign per sample. In evaluation it uses the mean of both signs, which is the
        original network.

        Args:
            x: The state (B, ..., C).
            is_training: Whether the block is in training mode.
            number: Replaces `value`, but not a learned parameter.
        """
        value: Scalar = self.value if number is None else number
        if self.learned is not None:
            value = self.learned()
        if self.rule == "bdia" and not is_training:
            value = 0.0
        elif self.rule == "bdia":
            sign = torch.randint(0, 2, (len(x), *(1 for _ in x.shape[1:])), device=x.device) * 2 - 1
            value = sign.to(x.dtype) * value
        return RULES[self.rule](value)

    @property
    def gamma(self) -> float:
        """The current |gamma|, the coefficient of x_{t-2} in training; on the meta device, its initial value."""
        is_known = self.learned is not None and self.learned.weight.device.type != "meta"
        value = float(self.learned().detach()) if self.learned is not None and is_known else self.value
        return abs(float(RULES[self.rule](value).residual))

    def extra_repr(self) -> str:
        return f"{self.value}, rule={self.rule}, learned={self.learned is not None}"


def checked_blend(value: float, least: float = 0.0) -> float:
    """Return a valid blend as a float.

    Args:
        value: The blend.
        least: Exclusive lower bound.

    Raises:
        ArgumentError: If the value is not a number in (least, 1].
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value <= 1:
        text = f"blend = {value!r}: give a number above {least:g} and at most 1"
        raise ArgumentError(text, "blend", code="out-of-range")
    return float(value)


def update_of(output: Tensor, x: Tensor, coefficients: Coefficients) -> Tensor:
    """Return F_t, the update without its residual, from the output of a block.

    Args:
        output: G(x) = x + f(x), shape (B, ..., C).
        x: x_{t-1}, of the same shape.
        coefficients: Of the update rule.
    """
    keep, scale, _ = coefficients
    output = output.to(torch.promote_types(output.dtype, x.dtype))
    if isinstance(scale, Tensor) or scale != 1.0:
        output = output * _as(scale, output)
    rest = _as(keep, x) - _as(scale, x)
    if isinstance(rest, Tensor):
        return torch.addcmul(output, rest, x)
    return output if rest == 0.0 else torch.add(output, x, alpha=rest)


def start_of(coefficients: Coefficients) -> Coefficients:
    """Return the coefficients of the first block, for which x_{t-1} and x_{t-2} are the same state."""
    keep, scale, residual = coefficients
    total = keep + residual
    if not isinstance(total, Tensor) and abs(total - 1.0) < 1e-12:
        total = 1.0  # (1 - b) + b, without its rounding error
    return Coefficients(total, scale, 0.0)


def _as(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.dtype) if isinstance(value, Tensor) else value
