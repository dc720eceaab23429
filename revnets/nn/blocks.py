"""Built-in blocks. Each keeps the shape of its input; channels are the last axis.

B batch, H W height and width, N any number of positions (H W flattened, or words), C channels.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from revnets.config.registry import register_block

# Types of options with their ranges: what a YAML gives is checked against the signature (revnets/config/components.py).
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(gt=0)]

EPS = 1e-6
"""Epsilon of every LayerNorm, as in ConvNeXt and RevCol."""


def init_weights(module: nn.Module) -> None:
    """Truncated normal of standard deviation 0.02, biases zero (RevCol, appendix D.1)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A convolution of (B, H, W, C): the permutations are views, the kernel sees channels_last memory."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Stochastic depth: drops a whole sample's residual branch with probability `rate` (Huang et al., 2016)."""

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ArgumentError(f"drop_path {rate}: a rate lies in [0, 1)", "drop_path", code="out-of-range")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"{self.rate}"


class LayerScale(nn.Module):
    """A learnable scale per channel at the end of a residual branch (Touvron et al., 2021)."""

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class MLP(nn.Module):
    """Linear, GELU, Linear over the channels."""

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        # A tenth of the time of inference goes into the memory of a second tensor of this size. Gradients need it, and
        # so does whoever looks at fc1; a trace is taken with gradients and checked without.
        in_place = not (hidden.requires_grad or self.fc1._forward_hooks or torch.jit.is_tracing())
        hidden = torch.ops.aten.gelu_(hidden) if in_place else F.gelu(hidden)
        return self.drop(self.fc2(self.drop(hidden)))


@register_block("convnext")
class ConvNeXtBlock(nn.Module):
    """ConvNeXt block (Liu et al., 2022), with RevCol's 3x3 kernel by default (section 2.2.2). Input (B, H, W, C).

    Without its shortcut it is the F of a RevNet, whose residual takes the shortcut's place.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: Count = 3,
        expand: Count = 4,
        layer_scale: float = 1e-6,
        drop_path: Rate = 0.0,
        shortcut: bool = True,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ArgumentError(
                f"kernel_size {kernel_size} would change the size of the image. Give an odd number", "kernel_size"
            )
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, expand * dim)
        self.scale = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.shortcut = shortcut
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.drop_path(self.scale(self.mlp(self.norm(conv2d(x, self.dwconv)))))
        return x + branch if self.shortcut else branch


class Attention(nn.Module):
    """Multi-head self-attention over all positions. Input (B, N, C)."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            fits = sorted((count for count in range(1, dim + 1) if dim % count == 0), key=lambda n: abs(n - heads))[:3]
            near = ", ".join(str(count) for count in sorted(fits))
            raise ArgumentError(
                f"{dim} channels do not divide into {heads} heads. Give another dim, or heads {near}",
                "heads",
                code="not-divisible",
            )
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, C/heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))


@register_block("vit")
class ViTBlock(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al., 2021).

    Input (B, N, C), or (B, H, W, C) with every pixel a token. `dropout` acts on the attention weights and in the MLP.
    """

    def __init__(self, dim: int, heads: Count, mlp_ratio: Ratio = 4.0, dropout: Rate = 0.0, drop_path: Rate = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS)
        self.attn = Attention(dim, heads, dropout)
        self.norm2 = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, max(1, int(mlp_ratio * dim)), dropout)
        self.drop_path = DropPath(drop_path)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 3:
            raise ArgumentError(
                f"attention needs positions, (B, N, C) or (B, H, W, C), but the state is {tuple(x.shape)}",
                "x",
                code="shape-mismatch",
            )
        tokens = x.flatten(1, -2)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens.view(x.shape)


@register_block("mlp")
class MLPBlock(nn.Module):
    """A residual MLP on every position by itself. Input (..., C)."""

    def __init__(self, dim: int, expand: Count = 4, dropout: Rate = 0.0, drop_path: Rate = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, expand * dim, dropout)
        self.drop_path = DropPath(drop_path)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm(x)))
