"""The transformer block of the encoder's columns. States are (B, T, C): sentences, positions, channels."""

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
"""By the names of fairseq's `--activation-fn`, whose accurate GELU is the approximation by a tanh."""


class Dropout(nn.Dropout):
    """Dropout that `fairseq-generate --retain-dropout` can keep alive, and faster on the CPU than PyTorch's.

    There, drawing masks takes a tenth of a block's time, and a replay draws them again. Four numbers of 16 bits are cut
    out of each of the generator's with 64, so the rate is a multiple of 2^-16.
    """

    retain_dropout = False

    def forward(self, input: Tensor) -> Tensor:
        if self.p == 0 or not (self.training or self.retain_dropout):
            return input
        if input.device.type != "cpu" or torch.compiler.is_compiling():
            return F.dropout(input, self.p)
        dropped = min(max(round(self.p * 2**16), 1), 2**16 - 1)
        numbers = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        highest = dropped - 2**15 - 1  # of the numbers that drop; a comparison would take five times as long as this
        kept = numbers[: input.numel()].view(input.shape).clamp_(highest, highest + 1).sub_(highest)
        return input * kept.to(input.dtype).mul_(2**16 / (2**16 - dropped))


@register_block("transformer")
class TransformerBlock(nn.Module):
    """Self-attention and feed-forward network, each with a residual and a LayerNorm (Vaswani et al., 2017).

    Args:
        heads: of the attention; must divide `dim`.
        ffn_dim: channels inside of the feed-forward network.
        dropout, attention_dropout, activation_dropout: of either branch, of the attention weights, and behind the
            activation function.
        attention: by dot products (`standard`) or by cosines (`cosine`).
        norm: where the LayerNorm stands. `post`: LN(x + f(x)), the original; `pre`: x + f(LN(x)); `res-post`:
            x + LN(f(x)), that of Swin Transformer V2.
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
        """(B, T, C) to the same shape; `padding_mask` (B, T) is True at padding."""
        x = self._residual(x, self.norm1, lambda y: self.attention(y, padding_mask))
        return self._residual(x, self.norm2, self.feed_forward)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation_drop(self.activation(self.fc1(x))))

    def _residual(self, x: Tensor, norm: nn.LayerNorm, branch) -> Tensor:
        if self.norm == "pre":
            return x + self.drop(branch(norm(x)))
        if self.norm == "res-post":
            return x + self.drop(norm(branch(x)))
        return norm(x + self.drop(branch(x)))
