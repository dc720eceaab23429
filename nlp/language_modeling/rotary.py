"""Rotary position embeddings (Su et al., 2021, RoFormer).

As in Llama, channel i of a head is paired with channel i + D / 2.

Shapes: B sequences, T positions, H heads, D channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the angles, each (B or 1, 1, T, D)."""


def rotation(positions: Tensor, channels: int, base: float, dtype: torch.dtype) -> Rotation:
    """Compute cosines and sines of the angles position * base^(-2i / D).

    They are computed in float32 in every call, so models need no buffers that limit length or dtype.

    Args:
        positions: (B or 1, T) integers, starting at 0.
        channels: Channels of a head D, an even number.
        base: Base of the angles.
        dtype: Dtype of the result.
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=positions.device) / channels
    angles = positions[:, None, :, None].float() * base**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, by: Rotation) -> Tensor:
    """Rotate every pair of channels of queries or keys (B, H, T, D) by the angle of its position."""
    cos, sin = by
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
