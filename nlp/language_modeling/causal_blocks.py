"""The blocks of a language model. States are (B, T, C): sequences, positions, channels."""

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
    """A feed-forward network on every position: with `silu` a gated one, SwiGLU (Shazeer, 2020), with `gelu` plain."""

    def __init__(self, dim: int, hidden: int, activation: str, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias) if activation == "silu" else None
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = BranchEnd(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        return self.down_proj(F.gelu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up)


@register_block("causal_transformer")
class CausalBlock(nn.Module):
    """Causal attention and a feed-forward network, each behind a norm and with a residual (Radford et al., 2019).

    Args:
        heads, kv_heads: of the attention; `kv_heads` are as many as `heads` if they are not given.
        ffn_dim: channels inside of the feed-forward network; by default 4 C, of a gated one 8/3 C.
        activation: `silu` for SwiGLU, `gelu` for a plain network.
        norm: `rms` or `layer`.
        dropout, attention_dropout: of either branch, and of the attention weights.
        bias: do linear layers have one?
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
        """(B, T, C) to the same shape; the other arguments are those of `CausalAttention`."""
        x = x + self.drop(self.attention(self.input_norm(x), rotation, mask, cache))
        return x + self.drop(self.ffn(self.ffn_norm(x)))

    def increment(self, x: Tensor, **context: Any) -> Tensor:
        """What `forward` adds to its input: the F of a network whose reversible residual is the only one."""
        attended = self.drop(self.attention(self.input_norm(x), **context))
        return attended + self.drop(self.ffn(self.ffn_norm(x + attended)))
