"""Kernel padding (appendix D.3.1): trained kernels in the center of larger ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from revnets.config.errors import ArgumentError
from vision.weights.official_names import BACKBONE, official_name

STD = 1e-7
"""Standard deviation of the values around a trained kernel. They barely change the outputs, but have gradients."""


def padded(weight: Tensor, size: int, std: float = STD) -> Tensor:
    """Pad kernels (C, 1, k, k) to (C, 1, size, size) with normal noise.

    The paper trains RevCol-H with kernels of 3 and pads them to 7 for COCO and to 13 for ADE20K.

    Args:
        weight: The kernels.
        size: Of the result. The difference from k must be even.
        std: Standard deviation of the noise, which has mean 0 and is drawn from the global generator.

    Raises:
        ArgumentError: If kernels cannot be centered in kernels of that size.
    """
    margin, odd = divmod(size - weight.shape[-1], 2)
    if margin < 0 or odd:
        raise ArgumentError(
            f"a kernel of {weight.shape[-1]} cannot be centered in one of {size}", "size", code="shape-mismatch"
        )
    inside = F.pad(torch.ones_like(weight, dtype=torch.bool), [margin] * 4)
    noise = torch.randn(inside.shape, device=weight.device).mul_(std).to(weight.dtype)
    return torch.where(inside, F.pad(weight, [margin] * 4), noise)


def fit_kernels(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pad depthwise kernels to the size of the model's. Larger kernels are not changed.

    Args:
        state: Weights under our or the official names.
        own: Weights of the model, under our names.
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
