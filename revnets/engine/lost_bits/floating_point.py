"""Floating-point tensors as integers."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}


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
