"""Blocks of a language model. States are (B, T, C): sequences, positions, channels."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from revnets.config.registry import register_block
from revnets.nn.blocks import Count, Rate

from .causal_attention import BranchEnd, CausalAttention, KeyValueCache
from .rotary import Rotation

NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class FeedForward(nn.Module):
    """Feed-forward network on every position: gated (SwiGLU, Shazeer, 2020) with `silu`, plain with `gelu`.

    Args:
        dim: Channels C.
        hidden: Hidden channels.
        activation: `silu` or `gelu`.
        bias: Whether linear layers have a bias.
    """

    def __init__(self, dim: int, hidden: int, activation: str, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias) if activation == "silu" else None
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = BranchEnd(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network; the shape (B, T, C) does not change."""
        up = self.up_proj(x)
        return self.down_proj(F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up)


@register_block("causal_transformer")
class CausalBlock(nn.Module):
    """Pre-norm transformer block: causal attention and a feed-forward network (Radford et al., 2019).

    Args:
        dim: Channels C.
        heads: Number of query heads.
        kv_heads: Number of key and value heads. By default `heads`.
        ffn_dim: Hidden channels of the feed-forward network. By default 4 C, or 8/3 C for a gated network.
        activation: `silu` for SwiGLU, `gelu` for a plain network.
        norm: `rms` for RMSNorm, `layer` for LayerNorm.
        norm_eps: Epsilon of the norms.
        dropout: Dropout rate of both branches.
        attention_dropout: Dropout rate of the attention weights.
        bias: Whether linear layers have a bias.

    Raises:
        ArgumentError: If the channels or the heads cannot be divided.
    """

    def __init__(
        self,
        dim: int,
        heads: Count = 1,
        kv_heads: Count | None = None,
        ffn_dim: Count | None = None,
        activation: Literal["silu", "gelu"] = "silu",
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-6,
        dropout: Rate = 0.0,
        attention_dropout: Rate = 0.0,
        bias: bool = False,
    ):
        super().__init__()
        self.input_norm = NORMS[norm](dim, eps=norm_eps)
        self.attention = CausalAttention(dim, heads, kv_heads, attention_dropout, bias)
        self.ffn_norm = NORMS[norm](dim, eps=norm_eps)
        self.ffn = FeedForward(dim, ffn_dim or (8 * dim // 3 if activation == "silu" else 4 * dim), activation, bias)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Apply the block.

        Args:
            x: (B, T, C) states.
            rotation: See `CausalAttention.forward`.
            mask: See `CausalAttention.forward`.
            cache: See `CausalAttention.forward`.

        Returns:
            (B, T, C) states.
        """
        x = x + self.drop(self.attention(self.input_norm(x), rotation, mask, cache))
        return x + self.drop(self.ffn(self.ffn_norm(x)))

    def increment(self, x: Tensor, **context: Any) -> Tensor:
        """Compute the output of `forward` minus its input, (B, T, C): the F of a purely reversible residual."""
        attended = self.drop(self.attention(self.input_norm(x), **context))
        return attended + self.drop(self.ffn(self.ffn_norm(x + attended)))
