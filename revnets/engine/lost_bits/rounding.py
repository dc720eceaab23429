"""Floating-point numbers as integers, and how many bits of x_{t-m} the rounding of x_t hides.

What is hidden follows from what backward knows as well.

x_t is rounded to the grid of floating-point numbers near x_t, so that all x_{t-m} within ulp(x_t) / |gamma| give the
same x_t. Among them are 2^w numbers of the grid near x_{t-m}, with e for the exponent of a number and

    w = e(x_t) - e(x_{t-m}) - log2 |gamma|.

The reconstruction r = (x_t - F_t) / gamma is near the middle and has the exponent of x_{t-m}. So the difference d of
the bit patterns lies within +-2^(w-1), nearly always and close to uniformly: w bits say all but the sign of the two
ends. Where 2^w < 1, r is x_{t-m} itself if gamma is a power of two, which rounds nothing, or else off by 1 at most.
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
"""Bits of the widest field; a larger difference is kept whole."""

TOLERANCE = 2**-0.1
"""A gamma up to 7 % below a power of two counts as that: the window is hardly wider, and d rarely leaves the field."""


class Layout(NamedTuple):
    """Where the bits of a floating-point number lie."""

    size: int  # bytes
    mantissa: int  # bits, the implicit one not counted
    exponent_mask: int


@cache
def layout_of(dtype: torch.dtype) -> Layout:
    """The layout of a dtype; of a complex one, that of its parts."""
    info = torch.finfo(dtype)
    mantissa = round(-torch.tensor(info.eps, dtype=torch.float64).log2().item())
    return Layout(info.bits // 8, mantissa, (1 << (info.bits - 1)) - (1 << mantissa))


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat vector of integers; shares it."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    return flat.view(_INTEGER[flat.element_size()])


def is_dense(tensor: Tensor) -> bool:
    """Do the elements fill a stretch of memory, each once?"""
    length = 1
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size != 1:
            if stride != length:
                return False
            length *= size
    return True


class Magnification(NamedTuple):
    """By how much the division by gamma magnifies what was rounded."""

    bits: Tensor | int  # -log2 |gamma|, rounded up; one number, or int16 in a shape that broadcasts to the state
    exact: bool  # is every gamma a power of two?

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
        """For every element of a tensor on the CPU, in the order of memory; one number if all are alike."""
        if isinstance(self.bits, int):
            return self.bits
        spread = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int16).copy_(self.bits)
        flat = spread.as_strided((tensor.numel(),), (1,))
        return (flat.repeat_interleave(2) if tensor.is_complex() else flat).numpy()


def widest(layout: Layout) -> int:
    """A window wider than the mantissa reaches zero and the other sign, where d has no bound."""
    return min(WIDEST, layout.mantissa + 1)


def widths(
    state: NDArray[np.signedinteger],
    rebuilt: NDArray[np.signedinteger],
    magnification: NDArray[np.int16] | int,
    exact: bool,
    layout: Layout,
) -> NDArray[np.int16]:
    """Bits of the field of every element; more than `widest` where d has no bound.

    Args:
        state, rebuilt: bit patterns of x_t and of the reconstruction.
    """
    exponents = state & layout.exponent_mask
    exponents -= rebuilt & layout.exponent_mask
    exponents >>= layout.mantissa
    found = exponents.astype(np.int16, copy=False)
    found += magnification
    if exact:
        np.add(found, found == 0, out=found)  # a window of one number may have two halves at its ends
    clamped = torch.from_numpy(found)  # pyright: ignore[reportUnknownMemberType]
    clamped.clamp_(0 if exact else 1, widest(layout) + 1)  # NumPy takes eight times as long
    return found


_SHARES = (0.2139, 0.1746, 0.1061, 0.0563, 0.0287, 0.0143, 0.0072, 0.0036, 0.0018, 0.0009, 0.0004, 0.0002)
"""P(e(x) - e(y) = n) of normal x and y with the same deviation, for n >= 0; it is the same for -n."""


def expected_bytes(gamma: ArrayLike, size: int = 4) -> NDArray[np.float64]:
    """Bytes for an element, where F_t and x_{t-m} are normal with the same deviation.

    Args:
        gamma: one or several.
        size: bytes of the element: 2 (taken for bfloat16), 4 or 8.
    """
    layout = Layout(size, {2: 7, 4: 23, 8: 52}[size], 0)
    absolute = np.clip(np.abs(gamma), 1e-30, 1e30)
    mantissa, exponent = np.frexp(absolute)
    magnification, exact = (mantissa < TOLERANCE) - exponent, mantissa == 0.5
    growth = np.log2(1 + absolute**2) / 2  # of the deviation, from x_{t-m} to x_t
    below = np.floor(growth)
    found = np.zeros_like(absolute)
    for distance in range(1 - len(_SHARES), len(_SHARES)):
        for step, weight in ((below, 1 - growth + below), (below + 1, growth - below)):
            bits = _expected_bits(magnification + step + distance, exact, layout)
            found += _SHARES[abs(distance)] * weight * bits
    return np.minimum(found / 8, size)


def _expected_bits(window: NDArray[np.float64], exact: NDArray[np.bool_], layout: Layout) -> NDArray[np.float64]:
    """For a window of 2^window numbers: the field, and the sign where the difference is at an end of it."""
    field = window + np.exp2(-np.maximum(window, 0))
    hardly_any = np.where(exact, np.where(window == 0, 1.25, 0), 1.2)
    return np.select([window > widest(layout), window > 0], [np.full_like(window, 8 * layout.size), field], hardly_any)
