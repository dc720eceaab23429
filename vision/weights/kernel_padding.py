"""Trained kernels in the middle of larger ones: the kernel padding of appendix D.3.1."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from revnets.config.errors import ArgumentError
from vision.weights.official_names import BACKBONE, official_name

STD = 1e-7
"""Standard deviation of the values around a trained kernel. The outputs stay what they were, the gradients do not."""


def padded(weight: Tensor, size: int, std: float = STD) -> Tensor:
    """Kernels (C, 1, k, k) in the middle of kernels (C, 1, size, size), with normal noise around them.

    The paper trains RevCol-H with kernels of 3 and pads them to 7 for COCO, to 13 for ADE20K.

    Args:
        size: of an even distance from k.
        std: of the noise, whose mean is 0. It is drawn from the global generator.

    Raises:
        ValueError: kernels cannot be in the middle of kernels of that size.
    """
    margin, odd = divmod(size - weight.shape[-1], 2)
    if margin < 0 or odd:
        raise ArgumentError(
            f"a kernel of {weight.shape[-1]} has no place in the middle of one of {size}", "size", code="shape-mismatch"
        )
    inside = F.pad(torch.ones_like(weight, dtype=torch.bool), [margin] * 4)
    noise = torch.randn(inside.shape, device=weight.device).mul_(std).to(weight.dtype)
    return torch.where(inside, F.pad(weight, [margin] * 4), noise)


def fit_kernels(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights whose depthwise kernels are as large as the model's; those that are larger already stay so.

    Args:
        state: under our names or the official ones.
        own: the model's, under ours.
    """
    fitted = dict(state)
    for name, tensor in own.items():
        if not name.endswith(".dwconv.weight"):
            continue
        for key in (name, *(official_name(name, BACKBONE) or ())[:1]):
            given = state.get(key)
            if given is not None and given.dim() == 4 and given.shape[:3] == (*tensor.shape[:2], given.shape[-1]):
                size = tensor.shape[-1]
                if given.shape[-1] < size and (size - given.shape[-1]) % 2 == 0:
                    fitted[key] = padded(given, size)
    return fitted
