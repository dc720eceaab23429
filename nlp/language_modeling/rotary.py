"""Rotary position embeddings (Su et al., 2021, RoFormer): channels of a head's first and second half pair up, as in
Llama.

B sequences, T positions, H heads, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles, each (B or 1, 1, T, D)."""


def rotation(positions: Tensor, channels: int, base: float, dtype: torch.dtype) -> Rotation:
    """The angles position * base^(-2i / D) of all positions, as cosines and sines.

    They are computed in float32 on every call, so that a model has no buffer whose size or dtype would bound it.

    Args:
        positions: (B or 1, T) whole numbers, from 0 on.
        channels: D, an even number.
        dtype: of the result.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
    angles = positions[:, None, :, None].float() * base**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Turn each pair of channels of queries or keys (B, H, T, D) by the angle of its position."""
    cos, sin = by
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
