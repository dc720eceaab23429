"""Transformer block of the encoder's columns. States are (B, T, C): sentences, positions, channels."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnets.config.registry import register_block
from revnets.nn.blocks import Count, Rate

from .attention import KINDS

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_accurate": partial(F.gelu, approximate="tanh"),
    "gelu_fast": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "linear": torch.positive,
}
"""Activation functions by fairseq's `--activation-fn`; its accurate GELU is the tanh approximation."""


class Dropout(nn.Dropout):
    """Dropout that supports `fairseq-generate --retain-dropout` and is faster than PyTorch's on CPUs.

    On CPUs, PyTorch's masks take a tenth of the time of a block, and a replay draws them again. Here, each random
    64-bit number gives four 16-bit numbers, so the rate is rounded to a multiple of 2^-16.
    """

    retain_dropout = False

    def forward(self, input: Tensor) -> Tensor:
        """Zero elements at the rate `p` and scale the others; the shape does not change."""
        if self.p == 0 or not (self.training or self.retain_dropout):
            return input
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(input, self.p)
        dropped = min(max(round(self.p * 2**16), 1), 2**16 - 1)
        numbers = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        highest = dropped - 2**15 - 1  # of the numbers that drop; a comparison would be five times slower
        kept = numbers[: input.numel()].view(input.shape).clamp_(highest, highest + 1).sub_(highest)
        return input * kept.to(input.dtype).mul_(2**16 / (2**16 - dropped))


@register_block("transformer")
class TransformerBlock(nn.Module):
    """Self-attention and feed-forward network, each with a residual and a LayerNorm (Vaswani et al., 2017).

    Args:
        dim: Channels C.
        heads: Number of attention heads; must divide `dim`.
        ffn_dim: Hidden channels of the feed-forward network.
        dropout: Dropout rate of both branches.
        attention_dropout: Dropout rate of the attention weights.
        activation_dropout: Dropout rate after the activation function.
        activation: Activation function, by fairseq's name.
        attention: `standard` for dot products, `cosine` for cosines.
        norm: Position of the LayerNorm. `post`: LN(x + f(x)), as in the original; `pre`: x + f(LN(x)); `res-post`:
            x + LN(f(x)), as in Swin Transformer V2.

    Raises:
        ArgumentError: If `heads` does not divide `dim`.
    """

    def __init__(
        self,
        dim: int,
        heads: Count = 1,
        ffn_dim: Count = 2048,
        dropout: Rate = 0.1,
        attention_dropout: Rate = 0.0,
        activation_dropout: Rate = 0.0,
        activation: Literal["relu", "gelu", "gelu_accurate", "gelu_fast", "silu", "tanh", "linear"] = "relu",
        attention: Literal["standard", "cosine"] = "standard",
        norm: Literal["post", "pre", "res-post"] = "post",
    ):
        super().__init__()
        self.norm = norm
        self.attention = KINDS[attention](dim, heads, attention_dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.activation = ACTIVATIONS[activation]
        self.activation_drop = Dropout(activation_dropout)
        self.drop = Dropout(dropout)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Apply the block.

        Args:
            x: (B, T, C) states.
            padding_mask: (B, T), True at padding. None if there is no padding.

        Returns:
            (B, T, C) states.
        """
        x = self._residual(x, self.norm1, lambda y: self.attention(y, padding_mask))
        return self._residual(x, self.norm2, self.feed_forward)

    def feed_forward(self, x: Tensor) -> Tensor:
        """Apply the feed-forward network to every position, without its residual."""
        return self.fc2(self.activation_drop(self.activation(self.fc1(x))))

    def _residual(self, x: Tensor, norm: nn.LayerNorm, branch) -> Tensor:
        if self.norm == "pre":
            return x + self.drop(branch(norm(x)))
        if self.norm == "res-post":
            return x + self.drop(norm(branch(x)))
        return norm(x + self.drop(branch(x)))
