"""Feature maps of padded images as a sequence of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

TEMPERATURE = 20
"""Ratio of the longest to the shortest wavelength in the encoding of positions."""


class FeatureSequence(NamedTuple):
    """The levels of a batch of images as S positions, row by row, level by level.

    Attributes:
        features: (B, S, C).
        encoding: (B, S, C), sines and cosines of the positions plus the embedding of the level.
        centers: (B, S, 2), x and y of every position as fractions of its image.
        visible: (B, L, 2), the fractions of the width and height of each level that the image covers.
        sizes: Height and width of each of the L levels.
        padded: (B, S), true at padding; None without padding.
    """

    features: Tensor
    encoding: Tensor
    centers: Tensor
    visible: Tensor
    sizes: list[tuple[int, int]]
    padded: Tensor | None

    def scaled(self, references: Tensor) -> Tensor:
        """Convert points (B, Q, 2) or boxes (B, Q, 4) to fractions of each padded level, (B, Q, L, 2 or 4)."""
        factors = self.visible.repeat(1, 1, references.shape[-1] // 2)
        return references[:, :, None] * factors[:, None]


class FeatureProjection(nn.Module):
    """Projects the backbone's feature maps to C channels and adds a level of half the size of the last one.

    Args:
        channels: Channels of the maps, finest first.
        dim: Output channels C.
    """

    def __init__(self, channels: Sequence[int], dim: int):
        super().__init__()
        self.maps = nn.ModuleList(_projection(count, dim, 1, 1) for count in channels)
        self.coarsest = _projection(channels[-1], dim, 3, 2)
        self.level = nn.Parameter(torch.empty(len(channels) + 1, dim))
        nn.init.normal_(self.level)

    def forward(self, maps: Sequence[Tensor], padded: Tensor | None) -> FeatureSequence:
        """Return the sequence of maps (B, channels, H, W).

        Args:
            maps: Levels of the backbone, finest first.
            padded: (B, height, width) of the images, true at padding; None without padding.
        """
        levels = [project(x) for project, x in zip(self.maps, maps, strict=True)]
        levels.append(self.coarsest(maps[-1]))
        shown = [_shown(x, padded) for x in levels]
        encodings = [
            sine_encoding(part.ends.flip(-1), x.shape[1] // 2, TEMPERATURE).flatten(1, 2) + embedding
            for x, part, embedding in zip(levels, shown, self.level, strict=True)
        ]
        return FeatureSequence(
            features=torch.cat([rearrange(x, "b c y x -> b (y x) c") for x in levels], 1),
            encoding=torch.cat(encodings, 1),
            centers=torch.cat([part.centers.flatten(1, 2) for part in shown], 1),
            visible=torch.stack([part.visible for part in shown], 1),
            sizes=[(x.shape[2], x.shape[3]) for x in levels],
            padded=None if padded is None else torch.cat([part.padded.flatten(1) for part in shown], 1),
        )


def sine_encoding(fractions: Tensor, dim: int, temperature: float) -> Tensor:
    """Encode n fractions by sines and cosines of dim / 2 wavelengths each: (..., n) to (..., n * dim)."""
    powers = torch.arange(dim // 2, dtype=torch.float32, device=fractions.device) * 2 / dim
    angles = fractions[..., None] * (2 * math.pi) / temperature**powers
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def _projection(channels: int, dim: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, dim, kernel, stride, kernel // 2, bias=False)
    nn.init.xavier_uniform_(convolution.weight)
    return nn.Sequential(convolution, _LevelNorm(32, dim))


class _LevelNorm(nn.GroupNorm):
    """GroupNorm that also supports a single position with one channel per group, for which it returns the bias."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _Shown(NamedTuple):
    """The part of a map (B, C, H, W) that the image covers.

    Attributes:
        centers: (B, H, W, 2), centers of the cells as fractions of the image.
        ends: (B, H, W, 2), right and bottom ends of the cells as fractions of the image.
        visible: (B, 2), covered fractions of the width and height.
        padded: (B, H, W), true at padding.
    """

    centers: Tensor
    ends: Tensor
    visible: Tensor
    padded: Tensor


def _shown(level: Tensor, padded: Tensor | None) -> _Shown:
    batch, _, height, width = level.shape
    if padded is None:
        mask = torch.zeros(batch, height, width, dtype=torch.bool, device=level.device)
    else:
        mask = F.interpolate(padded[:, None].float(), (height, width))[:, 0] > 0.5
    sides = torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], -1).float()  # (B, 2), width and height
    columns, rows = (torch.arange(1.0, count + 1, device=level.device) for count in (width, height))
    cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1)
    centers, ends = ((cells - shift) / sides[:, None, None] for shift in (0.5, 0.0))
    return _Shown(centers, ends, sides / sides.new_tensor([width, height]), mask)
