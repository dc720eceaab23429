"""Multi-scale deformable attention in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., "Deformable DETR", ICLR 2021) without compiled operators.

    Every query has a reference in the image. Each head samples `points` locations of each level around the reference.
    Their offsets and weights are linear functions of the query.

    Args:
        dim: Channels C of queries and feature maps.
        heads: Number of attention heads.
        levels: Number L of feature maps.
        points: Number of locations that a head samples in each level.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int = 4):
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value = nn.Linear(dim, dim)
        self.output = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let head h sample in direction 2 pi h / heads, at distances of 1, 2, ... cells, with equal weights."""
        for linear in (self.offsets, self.weights):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in (self.value, self.output):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        directions = torch.stack([angles.cos(), angles.sin()], -1)
        directions /= directions.abs().amax(-1, keepdim=True)
        distances = torch.arange(1, self.points + 1, dtype=torch.float32)
        offsets = directions[:, None] * distances[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(repeat(offsets, "h p xy -> (h l p xy)", l=self.levels))

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        features: Tensor,
        sizes: Sequence[tuple[int, int]],
        padded: Tensor | None = None,
    ) -> Tensor:
        """Sample features around references.

        Args:
            queries: (B, Q, C).
            references: Points (B, Q, L, 2) as x and y, or boxes (B, Q, L, 4) as center, width and height, as fractions
                of each level's sides.
            features: (B, S, C), the positions of all levels, row by row, level by level.
            sizes: Height and width of each level.
            padded: (B, S), true at padding, where values are 0; None without padding.

        Returns:
            (B, Q, C).
        """
        values = self.value(features)
        if padded is not None:
            values = values.masked_fill(padded[..., None], 0)
        axes = {"h": self.heads, "l": self.levels}
        offsets = rearrange(self.offsets(queries), "b q (h l p xy) -> b q h l p xy", xy=2, **axes)
        weights = rearrange(self.weights(queries), "b q (h lp) -> b q h lp", h=self.heads).softmax(-1)
        weights = rearrange(weights, "b q h (l p) -> b q h l p", l=self.levels)
        references = rearrange(references, "b q l n -> b q 1 l 1 n")
        if references.shape[-1] == 2:
            sides = offsets.new_tensor([(width, height) for height, width in sizes])
            places = references + offsets / sides[:, None]
        else:
            places = references[..., :2] + offsets / self.points * references[..., 2:] * 0.5
        parts = values.split([height * width for height, width in sizes], dim=1)
        sampled = values.new_zeros(())
        for level, (part, (height, _)) in enumerate(zip(parts, sizes, strict=True)):
            maps = rearrange(part, "b (y x) (h c) -> (b h) c y x", h=self.heads, y=height)
            grid = rearrange(2 * places[:, :, :, level] - 1, "b q h p xy -> (b h) q p xy")
            found = F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            weight = rearrange(weights[:, :, :, level], "b q h p -> (b h) 1 q p")
            sampled = sampled + (found * weight).sum(-1)
        return self.output(rearrange(sampled, "(b h) c q -> b (h c) q", h=self.heads).transpose(1, 2))
