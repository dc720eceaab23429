"""The bits that x_t = F_t + gamma * x_{t-m} rounds away, kept so that the inverse is exact.

At forward time both x_{t-m} and its reconstruction (x_t - F_t) / gamma are at hand. Their difference, taken between
the bit patterns read as integers, is small: near 0.5 of gamma more than 99.7 % of it fits int8. The rest is kept as
(index, difference) pairs. Integer subtraction wraps and is undone by integer addition, so any value comes back bit
for bit: denormals, -0.0, infinities and NaN payloads as well.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


class LostBits(NamedTuple):
    """Difference between a state and its reconstruction, in units in the last place."""

    codes: Tensor  # int8, one an element, in the order of memory
    index: Tensor  # int32, where the code does not say all
    value: Tensor  # the difference there


def encode(state: Tensor, rebuilt: Tensor) -> LostBits:
    """What must be kept to turn `rebuilt` into `state`; both dense, of one shape, dtype and strides."""
    difference = _bits(state) - _bits(rebuilt)
    codes = difference.to(torch.int8)
    index = (codes != difference).nonzero().squeeze(1)
    return LostBits(codes, index.to(torch.int32), difference[index])


def decode(rebuilt: Tensor, lost: LostBits) -> Tensor:
    """Turn `rebuilt`, in place, into the state that `encode` saw."""
    difference = lost.codes.to(lost.value.dtype)
    difference[lost.index.long()] = lost.value
    _bits(rebuilt).add_(difference)
    return rebuilt


def _bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat vector of integers; shares it."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(_INTEGER[tensor.element_size()])
