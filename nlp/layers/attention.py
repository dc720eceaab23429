"""Self-attention over padded sentences, by dot products or by cosines.

B sentences, T positions, H heads, C channels, D = C / H channels of a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from revnets.config.errors import ArgumentError

MAX_LOGIT_SCALE = math.log(100)
"""Bound of the learned log-scale of cosine attention (Liu et al., 2022, Swin Transformer V2, section 3.3)."""


class MaskedAttention(nn.Module):
    """Multi-head self-attention that never looks at padding (Vaswani et al., 2017). (B, T, C) to (B, T, C).

    Weights are drawn as fairseq draws them: Xavier's uniform distribution, for queries, keys and values by 1/sqrt(2)
    narrower, which is Xavier's bound of the three as one matrix.
    """

    scale: float | None = None  # of the logits; None stands for 1 / sqrt(D)
    retain_dropout = False  # in evaluation as well, for fairseq-generate --retain-dropout

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            raise ArgumentError(
                f"{dim} channels do not divide into {heads} heads. Give a number of heads that divides",
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
        """`padding_mask` (B, T) is True at padding; None stands for no padding at all."""
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
        """Queries, keys and values, each (B, H, T, D)."""
        return self.split(self.qkv(x))

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, 3 C) to the three, each (B, H, T, D)."""
        q, k, v = rearrange(qkv, "b t (three h d) -> three b h t d", three=3, h=self.heads)
        return q, k, v


class MaskedCosineAttention(MaskedAttention):
    """Cosines of queries and keys, scaled per head by a learned factor of at most 100 (Swin Transformer V2, Eq. 2).

    Keys have no bias, as there.
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
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = self.split(F.linear(x, self.qkv.weight, bias))
        factor = self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
        # Squares of half-precision numbers overflow; the result has the dtype of v again.
        q = (F.normalize(q.float(), dim=-1) * factor).to(v.dtype)
        k = F.normalize(k.float(), dim=-1).to(v.dtype)
        return q, k, v


KINDS = {"standard": MaskedAttention, "cosine": MaskedCosineAttention}
