"""Self-attention over padded sentences, with dot products or cosines.

Shapes: B sentences, T positions, H heads, C channels, D = C / H channels per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from revnets.config.errors import ArgumentError

MAX_LOGIT_SCALE = math.log(100)
"""Upper bound of the learned log-scale of cosine attention (Liu et al., 2022, Swin Transformer V2, section 3.3)."""


class MaskedAttention(nn.Module):
    """Multi-head self-attention that masks padding (Vaswani et al., 2017). Maps (B, T, C) to (B, T, C).

    Weights are initialized as in fairseq: Xavier uniform, with a bound smaller by 1/sqrt(2) for queries, keys and
    values, which is the Xavier bound of their joint matrix.

    Args:
        dim: Channels C.
        heads: Number of heads H; must divide `dim`.
        dropout: Dropout rate of the attention weights.

    Raises:
        ArgumentError: If `heads` does not divide `dim`.
    """

    scale: float | None = None  # of the logits; None means 1 / sqrt(D)
    retain_dropout = False  # also in evaluation, for fairseq-generate --retain-dropout

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ArgumentError(
                f"{dim} channels cannot be divided into {heads} heads. Use a number of heads that divides {dim}",
                "heads",
                code="not-divisible",
            )
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        for linear in (self.qkv, self.proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Apply attention.

        Args:
            x: (B, T, C) states.
            padding_mask: (B, T), True at padding. None if there is no padding.

        Returns:
            (B, T, C) states.
        """
        q, k, v = self.project(x)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=None if padding_mask is None else ~padding_mask[:, None, None, :],
            dropout_p=self.dropout if self.training or self.retain_dropout else 0.0,
            scale=self.scale,
        )
        return self.proj(rearrange(y, "b h t d -> b t (h d)"))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values, each (B, H, T, D)."""
        return self.split(self.qkv(x))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split (B, T, 3 C) into queries, keys and values, each (B, H, T, D)."""
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
        return q, k, v


class MaskedCosineAttention(MaskedAttention):
    """Attention by cosines of queries and keys, scaled per head by a learned factor of at most 100.

    This is Eq. 2 of Swin Transformer V2 (Liu et al., 2022). As in the paper, keys have no bias.
    """

    scale = 1.0

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__(dim, heads, dropout)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        nn.init.xavier_uniform_(self.qkv.weight)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10)))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute scaled unit queries, unit keys and values, each (B, H, T, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = self.split(F.linear(x, self.qkv.weight, bias))
        factor = self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
        # Squares overflow in half precision. The result has the dtype of v.
        q = (F.normalize(q.float(), dim=-1) * factor).to(v.dtype)
        k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v


KINDS = {"standard": MaskedAttention, "cosine": MaskedCosineAttention}
"""Attention classes by the value of the option `attention`."""
