"""Decoders for intermediate supervision, which reconstruct the image from the top level of a column (2.3, D.1)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from revnets.nn.blocks import EPS, ConvNeXtBlock, init_weights


class StagedDecoder(nn.Module):
    """The decoder for ImageNet-1K: one stage per level, then a projection to pixels.

    Args:
        dims: Channels of the levels, level 0 first.
        reductions: Ratio of the image's sides to those of each level.
        channels: Channels of the image.
    """

    def __init__(self, dims: Sequence[int], reductions: Sequence[int], channels: int = 3):
        super().__init__()
        descending = list(pairwise(zip(dims[::-1], reductions[::-1], strict=True)))
        self.stages = nn.Sequential(
            *(DecoderStage(dim, lower, ratio // lower_ratio) for (dim, ratio), (lower, lower_ratio) in descending)
        )
        self.to_pixels = ToPixels(dims[0], reductions[0], channels)

    def forward(self, x: Tensor) -> Tensor:
        """Top level (B, H, W, C) to logits of pixels (B, channels, H * reduction, W * reduction)."""
        return self.to_pixels(self.stages(x))


class DecoderStage(nn.Module):
    """Linear layer to the width of the next lower level, LayerNorm, GELU, upsampling, and a block without expansion."""

    def __init__(self, dim_in: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.proj = nn.Linear(dim_in, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.block = ConvNeXtBlock(dim, kernel_size=3, expand=1)
        self.proj.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.proj(x))).permute(0, 3, 1, 2)
        if self.ratio != 1:
            x = F.interpolate(x, scale_factor=self.ratio, mode="bilinear", align_corners=True)
        return self.block(x.permute(0, 2, 3, 1))


class SingleDecoder(nn.Module):
    """The decoder for ImageNet-22K and larger data: LayerNorm and one linear layer to pixels.

    Args:
        dim: Channels of the top level.
        reduction: Ratio of the image's sides to those of the top level.
        channels: Channels of the image.
    """

    def __init__(self, dim: int, reduction: int, channels: int = 3):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.to_pixels = ToPixels(dim, reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Top level (B, H, W, C) to logits of pixels (B, channels, H * reduction, W * reduction)."""
        return self.to_pixels(self.norm(x))


class ToPixels(nn.Module):
    """Projects every position to a patch of `ratio` x `ratio` pixels."""

    def __init__(self, dim: int, ratio: int, channels: int):
        super().__init__()
        self.proj = nn.Linear(dim, channels * ratio**2)
        self.shuffle = Rearrange("b h w (c i j) -> b (h i) (w j) c", i=ratio, j=ratio)
        self.proj.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.proj(x)).permute(0, 3, 1, 2)


def decoder(kind: str, dims: Sequence[int], reductions: Sequence[int], channels: int) -> nn.Module:
    """Build a decoder for the top level of a column, of the kind `staged` or `single`."""
    if kind == "staged":
        return StagedDecoder(dims, reductions, channels)
    return SingleDecoder(dims[-1], reductions[-1], channels)
