"""Causal self-attention with grouped queries and a cache of keys and values.

B sequences, T positions of this call, S positions seen so far (those of the cache included), H heads, C channels,
D = C / H channels of a head.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from revnets.config.errors import ArgumentError

from .rotary import Rotation, rotate


class KeyValueCache(Protocol):
    """Keys and values of earlier positions, by attention layer; a `transformers.Cache` is one."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, T, D) of a layer, and return all of it, (B, heads, S, D)."""
        ...


class BranchEnd(nn.Linear):
    """The last layer of a residual branch, whose first weights a deep model makes narrower (Radford et al., 2019)."""


class CausalAttention(nn.Module):
    """Multi-head attention in which a position sees itself and those before it. (B, T, C) to (B, T, C).

    Args:
        dim: C.
        heads: H, of the queries.
        kv_heads: heads of keys and values, each shared by H / kv_heads heads of queries (Ainslie et al., 2023).
        dropout: of the attention weights.
        bias: do the projections have one?

    Attributes:
        layer_idx: which layer of a cache belongs to this module. A model numbers its modules.

    Raises:
        ArgumentError: sizes that do not divide.
    """

    layer_idx: int = 0

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        kv_heads = kv_heads or heads
        if dim % heads or dim // heads % 2:
            problem = f"{dim} channels do not divide into {heads} heads of an even number of channels"
            raise ArgumentError(f"{problem}. Give another number", "heads", code="not-divisible")
        if heads % kv_heads:
            problem = f"{heads} heads of queries do not divide among {kv_heads} of keys and values"
            raise ArgumentError(f"{problem}. Give a number that divides", "kv_heads", code="not-divisible")
        self.heads, self.kv_heads, self.dropout = heads, kv_heads, dropout
        width = dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * width, bias=bias)
        self.o_proj = BranchEnd(dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            rotation: of queries and keys, for the T positions; None for attention without positions.
            mask: (B or 1, 1, T, S), True where a query may look, or numbers that are added to the logits. None for the
                plain causal mask if T = S, and for all S positions if T = 1.
            cache: takes the keys and values of this call and gives those of all calls.
        """
        q = rearrange(self.q_proj(x), "b t (h d) -> b h t d", h=self.heads)
        k = rearrange(self.k_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        v = rearrange(self.v_proj(x), "b t (h d) -> b h t d", h=self.kv_heads)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q.shape[2] > 1,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.o_proj(rearrange(y, "b h t d -> b t (h d)"))
