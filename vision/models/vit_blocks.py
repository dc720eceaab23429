"""Components of RevCol-ViT (appendix B): patches with learned positions, and a post-norm block."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import resample_abs_pos_embed_nhwc
from timm.models import register_notrace_module
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from revnets.nn.blocks import EPS, MLP, Count, DropPath, Rate, Ratio, init_weights


@register_notrace_module
class PatchEmbed(nn.Module):
    """Map images (B, in_chans, H, W) to patches with learned positions, (B, H // patch, W // patch, dim).

    The positions are learned for images of `img_size` and interpolated for other sizes.
    """

    def __init__(self, dim: int, img_size: Count = 224, in_chans: Count = 3, patch: Count = 16):
        super().__init__()
        if img_size % patch:
            raise ArgumentError(
                f"img_size is {img_size}, not a multiple of patch {patch}. Change one of them",
                "img_size",
                code="not-divisible",
            )
        self.example_shape = (in_chans, img_size, img_size)
        self.conv = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.empty(img_size // patch, img_size // patch, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).permute(0, 2, 3, 1)
        return x + resample_abs_pos_embed_nhwc(self.pos_embed[None], [x.shape[1], x.shape[2]])


def fit_positions(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapt weights to a model for another image size by interpolating position embeddings (H, W, C)."""
    name = "stem.pos_embed"
    own = dict(model.named_parameters()).get(name)
    if own is not None and name in state and state[name].dim() == 3 and state[name].shape[2] == own.shape[2]:
        height, width, _ = own.shape
        state = {**state, name: resample_abs_pos_embed_nhwc(state[name][None], [height, width])[0]}
    return state


class CosineAttention(nn.Module):
    """Self-attention by the cosine of queries and keys, with a learned temperature per head (Liu et al., 2022).

    The input is (B, N, C). The scale is initialized to 10 and clamped to at most 100.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ArgumentError(
                f"{dim} channels are not divisible by {heads} heads. Change dim or heads",
                "heads",
                code="not-divisible",
            )
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.logit_scale = nn.Parameter(torch.full((heads,), math.log(10)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        scale = self.logit_scale.clamp(max=math.log(100)).exp().view(-1, 1, 1)
        q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=1.0)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class PostNormBlock(nn.Module):
    """Transformer block with cosine attention and post-norm, as in Swin V2.

    The input is (B, H, W, C), where every position is a token, or (B, N, C).
    """

    def __init__(self, dim: int, heads: Count, mlp_ratio: Ratio = 4.0, drop_path: Rate = 0.0):
        super().__init__()
        self.attn = CosineAttention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, max(1, int(mlp_ratio * dim)))
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.drop_path = DropPath(drop_path)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, -2)
        tokens = tokens + self.drop_path(self.norm1(self.attn(tokens)))
        tokens = tokens + self.drop_path(self.norm2(self.mlp(tokens)))
        return tokens.view(x.shape)
