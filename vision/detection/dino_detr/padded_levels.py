"""Feature maps of padded images as one sequence of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

TEMPERATURE = 20
"""Ratio of the longest to the shortest wavelength in the encoding of positions in the image."""


class FeatureSequence(NamedTuple):
    """The levels of a batch of images: S positions, row by row, one level after another.

    Attributes:
        features: (B, S, C).
        encoding: (B, S, C), sines and cosines of the centers, and the embedding of the level.
        centers: (B, S, 2), x and y of every position as fractions of its image.
        visible: (B, L, 2), the fractions of the width and the height of each level that show the image.
        sizes: height and width of each of the L levels.
        padded: (B, S), true where there is no image; None if there is no padding at all.
    """

    features: Tensor
    encoding: Tensor
    centers: Tensor
    visible: Tensor
    sizes: list[tuple[int, int]]
    padded: Tensor | None

    def scaled(self, references: Tensor) -> Tensor:
        """Points (B, Q, 2) or boxes (B, Q, 4) of the images, as fractions of each level with padding (B, Q, L, n)."""
        factors = self.visible.repeat(1, 1, references.shape[-1] // 2)
        return references[:, :, None] * factors[:, None]


class FeatureProjection(nn.Module):
    """Feature maps of the backbone to C channels, and one more level of half the size of the last.

    Args:
        channels: of the maps, finest first.
        dim: channels C that come out.
    """

    def __init__(self, channels: Sequence[int], dim: int):
        super().__init__()
        self.maps = nn.ModuleList(_projection(count, dim, 1, 1) for count in channels)
        self.coarsest = _projection(channels[-1], dim, 3, 2)
        self.level = nn.Parameter(torch.empty(len(channels) + 1, dim))
        nn.init.normal_(self.level)

    def forward(self, maps: Sequence[Tensor], padded: Tensor | None) -> FeatureSequence:
        """Maps (B, channels, H, W) of images whose padding (B, height, width) is true, to a sequence."""
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
    """Sines and cosines of dim / 2 wavelengths for each of n fractions: (..., n) to (..., n * dim)."""
    powers = torch.arange(dim // 2, dtype=torch.float32, device=fractions.device) * 2 / dim
    angles = fractions[..., None] * (2 * math.pi) / temperature**powers
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def _projection(channels: int, dim: int, kernel: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, dim, kernel, stride, kernel // 2, bias=False)
    nn.init.xavier_uniform_(convolution.weight)
    return nn.Sequential(convolution, _LevelNorm(32, dim))


class _LevelNorm(nn.GroupNorm):
    """GroupNorm that also takes a level of a single position with one channel a group: it gives the bias."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class _Shown(NamedTuple):
    """Where a map (B, C, H, W) shows the image: centers and ends of its cells, (B, H, W, 2) fractions of the image."""

    centers: Tensor
    ends: Tensor
    visible: Tensor  # (B, 2), of width and height
    padded: Tensor  # (B, H, W)


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
