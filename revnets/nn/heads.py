"""Heads: from the states of the last column to an output."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from revnets.config.registry import register_head
from revnets.nn.blocks import EPS, Count, Rate, init_weights


@register_head("classifier")
class ClassifierHead(nn.Module):
    """Mean over all positions of the top level, LayerNorm, Linear: (B, ..., C) to (B, num_classes)."""

    def __init__(self, dims: Sequence[int], num_classes: Count, dropout: Rate = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(dims[-1], num_classes)
        self.apply(init_weights)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        top = levels[-1]
        return self.fc(self.drop(self.norm(top.flatten(1, -2).mean(1) if top.dim() > 2 else top)))
