"""Causal self-attention with grouped queries and a cache of keys and values.

Shapes: B sequences, T positions of this call, S positions including those in the cache, H heads, C channels,
D = C / H channels per head.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from revnets.config.errors import ArgumentError

from .rotary import Rotation, rotate


class KeyValueCache(Protocol):
    """Cache of keys and values by attention layer, such as `transformers.Cache`."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, heads, T, D) of a layer, and return all of the layer, (B, heads, S, D)."""
        ...


class BranchEnd(nn.Linear):
    """Last layer of a residual branch, whose initial weights are scaled down in deep models (Radford et al., 2019)."""


class CausalAttention(nn.Module):
    """Multi-head attention to the current and earlier positions. Maps (B, T, C) to (B, T, C).

    Args:
        dim: Channels C.
        heads: Number of query heads H.
        kv_heads: Number of key and value heads, each shared by H / kv_heads query heads (Ainslie et al., 2023). By
            default H.
        dropout: Dropout rate of the attention weights.
        bias: Whether the projections have a bias.

    Attributes:
        layer_idx: Layer of the cache that belongs to this module; set by the model.

    Raises:
        ArgumentError: If the channels or the heads cannot be divided.
    """

    layer_idx: int = 0

    def __init__(self, dim: int, heads: int, kv_heads: int | None = None, dropout: float = 0.0, bias: bool = False):
        super().__init__()
        kv_heads = kv_heads or heads
        if dim % heads or dim // heads % 2:
            problem = f"{dim} channels cannot be divided into {heads} heads with an even number of channels"
            raise ArgumentError(f"{problem}. Use another number of heads", "heads", code="not-divisible")
        if heads % kv_heads:
            problem = f"{heads} query heads cannot share {kv_heads} key and value heads equally"
            raise ArgumentError(f"{problem}. Use a number that divides {heads}", "kv_heads", code="not-divisible")
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
        """Apply attention.

        Args:
            x: (B, T, C) states.
            rotation: Rotary embedding of the T positions; None for attention without positions.
            mask: (B or 1, 1, T, S), True where a query may attend, or values to add to the logits. None for the causal
                mask if T = S, and for all S positions if T = 1.
            cache: Stores the keys and values of this call and returns those of all calls.

        Returns:
            (B, T, C) states.
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
