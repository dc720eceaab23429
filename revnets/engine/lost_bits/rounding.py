"""Floating-point numbers as integers, and the number of bits of x_{t-m} that the rounding of x_t loses.

This number follows from values that backward has as well.

x_t is rounded to the grid of floating-point numbers near x_t, so all x_{t-m} within ulp(x_t) / |gamma| of each other
give the same x_t. With e(x) for the exponent of x, these are 2^w numbers of the grid near x_{t-m}, where

    w = e(x_t) - e(x_{t-m}) - log2 |gamma|.

The reconstruction r = (x_t - F_t) / gamma is near their middle and has the exponent of x_{t-m}. So the difference d of
the bit patterns is almost always within +-2^(w-1), and nearly uniform: w bits determine it except for the sign of the
two ends. If 2^w < 1, r equals x_{t-m} if gamma is a power of two, which rounds nothing, and is off by at most 1 if not.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}

WIDEST = 15
"""Bits of the widest field; larger differences are stored whole."""

TOLERANCE = 2**-0.1
"""A gamma up to 7 % below a power of two counts as that power: d rarely exceeds the field."""


class Layout(NamedTuple):
    """Bit layout of a floating-point number."""

    size: int  # bytes
    mantissa: int  # bits, without the implicit one
    exponent_mask: int


@cache
def layout_of(dtype: torch.dtype) -> Layout:
    """Return the layout of a dtype; for a complex dtype, the layout of its real and imaginary parts."""
    info = torch.finfo(dtype)
    mantissa = round(-torch.tensor(info.eps, dtype=torch.float64).log2().item())
    return Layout(info.bits // 8, mantissa, (1 << (info.bits - 1)) - (1 << mantissa))


def bits_of(tensor: Tensor) -> Tensor:
    """Return the tensor's memory as a flat vector of integers, without a copy."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    return flat.view(_INTEGER[flat.element_size()])


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory without gaps and overlaps."""
    length = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1:
            if stride != length:
                return False
            length *= size
    return True


class Magnification(NamedTuple):
    """How much the division by gamma magnifies the rounding error."""

    bits: Tensor | int  # -log2 |gamma|, rounded up; one number, or int16 in a shape that broadcasts to the state
    exact: bool  # whether every gamma is a power of two

    @classmethod
    def of(cls, gamma: Tensor | float) -> Magnification:
        if not isinstance(gamma, Tensor):
            mantissa, exponent = math.frexp(abs(gamma))
            return cls(int(mantissa < TOLERANCE) - exponent, mantissa == 0.5)
        mantissa, exponent = torch.frexp(gamma.detach().abs().double())
        bits = ((mantissa < TOLERANCE).int() - exponent).clamp_(-9999, 9999).to(torch.int16)
        least, most = bits.aminmax()
        return cls(int(least) if least == most else bits, bool((mantissa == 0.5).all()))

    def along(self, tensor: Tensor) -> NDArray[np.int16] | int:
        """Return the bits for every element of a CPU tensor, in the order of memory; one number if all are equal."""
        if isinstance(self.bits, int):
            return self.bits
        spread = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int16).copy_(self.bits)
        flat = spread.as_strided((tensor.numel(),), (1,))
        return (flat.repeat_interleave(2) if tensor.is_complex() else flat).numpy()


def widest(layout: Layout) -> int:
    """Return the bits of the widest field. A window wider than the mantissa contains zero, where d has no bound."""
    return min(WIDEST, layout.mantissa + 1)


def widths(
    state: NDArray[np.signedinteger],
    rebuilt: NDArray[np.signedinteger],
    magnification: NDArray[np.int16] | int,
    exact: bool,
    layout: Layout,
) -> NDArray[np.int16]:
    """Return the field width of every element in bits; more than `widest` where d has no bound.

    Args:
        state: Bit patterns of x_t.
        rebuilt: Bit patterns of the reconstruction.
        magnification: Bits that the division by gamma adds.
        exact: Whether every gamma is a power of two.
        layout: Of the dtype.
    """
    exponents = state & layout.exponent_mask
    exponents -= rebuilt & layout.exponent_mask
    exponents >>= layout.mantissa
    bits = exponents.astype(np.int16, copy=False)
    bits += magnification
    if exact:
        np.add(bits, bits == 0, out=bits)  # a window of one number may have two halves at its ends
    clamped = torch.from_numpy(bits)  # pyright: ignore[reportUnknownMemberType]
    clamped.clamp_(0 if exact else 1, widest(layout) + 1)  # NumPy takes eight times as long
    return bits


_SHARES = (0.2139, 0.1746, 0.1061, 0.0563, 0.0287, 0.0143, 0.0072, 0.0036, 0.0018, 0.0009, 0.0004, 0.0002)
"""P(e(x) - e(y) = n) for normal x and y with the same standard deviation, n >= 0; symmetric in n."""


def expected_bytes(gamma: ArrayLike, size: int = 4) -> NDArray[np.float64]:
    """Return the expected bytes of lost bits per element, for normal F_t and x_{t-m} of equal standard deviation.

    Args:
        gamma: One or several gains.
        size: Bytes per element: 2 (treated as bfloat16), 4 or 8.
    """
    layout = Layout(size, {2: 7, 4: 23, 8: 52}[size], 0)
    absolute = np.clip(np.abs(gamma), 1e-30, 1e30)
    mantissa, exponent = np.frexp(absolute)
    magnification, exact = (mantissa < TOLERANCE) - exponent, mantissa == 0.5
    growth = np.log2(1 + absolute**2) / 2  # of the standard deviation, from x_{t-m} to x_t
    below = np.floor(growth)
    total = np.zeros_like(absolute)
    for distance in range(1 - len(_SHARES), len(_SHARES)):
        for step, weight in ((below, 1 - growth + below), (below + 1, growth - below)):
            bits = _expected_bits(magnification + step + distance, exact, layout)
            total += _SHARES[abs(distance)] * weight * bits
    return np.minimum(total / 8, size)


def _expected_bits(window: NDArray[np.float64], exact: NDArray[np.bool_], layout: Layout) -> NDArray[np.float64]:
    """Return the bits for a window of 2^window numbers: the field, and the sign of differences at an end."""
    field = window + np.exp2(-np.maximum(window, 0))
    hardly_any = np.where(exact, np.where(window == 0, 1.25, 0), 1.2)
    return np.select([window > widest(layout), window > 0], [np.full_like(window, 8 * layout.size), field], hardly_any)
