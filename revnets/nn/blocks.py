"""Built-in blocks. Each block keeps the shape of its input; channels are the last axis.

Shapes: B batch, H and W height and width, N number of positions (H W flattened, or tokens), C channels.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from revnets.config.registry import register_block

# Option types with ranges. Values from YAML are checked against the signature (revnets/config/registry.py).
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Ratio = Annotated[float, Field(gt=0)]

EPS = 1e-6
"""Epsilon of every LayerNorm, as in ConvNeXt and RevCol."""


def init_weights(module: nn.Module) -> None:
    """Initialize weights from a truncated normal with standard deviation 0.02, and biases with 0 (RevCol, D.1)."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def conv2d(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve a (B, H, W, C) tensor. The permutations are views, so the kernel gets channels_last memory."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DropPath(nn.Module):
    """Stochastic depth: drops the residual branch of a sample with probability `rate` (Huang et al., 2016).

    Args:
        rate: In [0, 1).

    Raises:
        ArgumentError: If the rate is out of range.
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0 <= rate < 1:
            raise ArgumentError(f"drop_path {rate}: give a rate in [0, 1)", "drop_path", code="out-of-range")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Scale the branch of each sample by 0 or 1 / (1 - rate); in evaluation, return it unchanged.

        Args:
            x: Output of the branch, shape (B, ...).
        """
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = torch.empty((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
        return x * mask.bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"{self.rate}"


class LayerScale(nn.Module):
    """Learnable scale per channel at the end of a residual branch (Touvron et al., 2021).

    Args:
        dim: Number of channels.
        init: Initial value of every scale.
    """

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Scale (..., C) per channel."""
        return x * self.gamma


class MLP(nn.Module):
    """Linear, GELU and Linear over the channels, with dropout after GELU and at the end.

    Args:
        dim: Number of channels.
        hidden: Number of hidden channels.
        dropout: Rate of both dropouts.
    """

    def __init__(self, dim: int, hidden: int, dropout: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        hidden = self.fc1(x)
        # Out of place, inference spends a tenth of its time on a second tensor of this size. Gradients and forward
        # hooks on fc1 need the original; a trace is recorded with gradients and checked without.
        in_place = not (hidden.requires_grad or self.fc1._forward_hooks or torch.jit.is_tracing())
        hidden = torch.ops.aten.gelu_(hidden) if in_place else F.gelu(hidden)
        return self.drop(self.fc2(self.drop(hidden)))


@register_block("convnext")
class ConvNeXtBlock(nn.Module):
    """ConvNeXt block (Liu et al., 2022), by default with RevCol's 3x3 kernel (section 2.2.2).

    Args:
        dim: Number of channels.
        kernel_size: Of the depthwise convolution, odd.
        expand: Ratio of hidden channels to channels in the MLP.
        layer_scale: Initial scale of the branch.
        drop_path: Rate of stochastic depth.
        shortcut: Add the input to the branch. Without it, the block is F of a RevNet, whose residual replaces it.

    Raises:
        ArgumentError: If the kernel size is even.
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
                f"kernel_size {kernel_size} changes the size of the image. Give an odd number", "kernel_size"
            )
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, expand * dim)
        self.scale = LayerScale(dim, layer_scale)
        self.drop_path = DropPath(drop_path)
        self.shortcut = shortcut
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        branch = self.drop_path(self.scale(self.mlp(self.norm(conv2d(x, self.dwconv)))))
        return x + branch if self.shortcut else branch


class Attention(nn.Module):
    """Multi-head self-attention over all positions.

    Args:
        dim: Number of channels, a multiple of `heads`.
        heads: Number of heads.
        dropout: Rate on the attention weights.

    Raises:
        ArgumentError: `dim` is not a multiple of `heads`.
    """

    def __init__(self, dim: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if dim % heads:
            fits = sorted((count for count in range(1, dim + 1) if dim % count == 0), key=lambda n: abs(n - heads))[:3]
            near = ", ".join(str(count) for count in sorted(fits))
            raise ArgumentError(
                f"{dim} channels are not divisible by {heads} heads. Give another dim, or heads {near}",
                "heads",
                code="not-divisible",
            )
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, C) to (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, C/heads)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.proj(x.transpose(1, 2).flatten(2))


@register_block("vit")
class ViTBlock(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al., 2021).

    Args:
        dim: Number of channels, a multiple of `heads`.
        heads: Number of attention heads.
        mlp_ratio: Ratio of hidden channels to channels in the MLP.
        dropout: Rate on the attention weights and in the MLP.
        drop_path: Rate of stochastic depth.

    Raises:
        ArgumentError: `dim` is not a multiple of `heads`.
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
        """Map (B, N, C), or (B, H, W, C) with each pixel as a token, to the same shape.

        Raises:
            ArgumentError: If the input has no axis of positions.
        """
        if x.dim() < 3:
            raise ArgumentError(
                f"attention needs a state of shape (B, N, C) or (B, H, W, C), but got {tuple(x.shape)}",
                "x",
                code="shape-mismatch",
            )
        tokens = x.flatten(1, -2)
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        tokens = tokens + self.drop_path(self.mlp(self.norm2(tokens)))
        return tokens.view(x.shape)


@register_block("mlp")
class MLPBlock(nn.Module):
    """Residual MLP, applied to each position independently.

    Args:
        dim: Number of channels.
        expand: Ratio of hidden channels to channels.
        dropout: Rate in the MLP.
        drop_path: Rate of stochastic depth.
    """

    def __init__(self, dim: int, expand: Count = 4, dropout: Rate = 0.0, drop_path: Rate = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, expand * dim, dropout)
        self.drop_path = DropPath(drop_path)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        return x + self.drop_path(self.mlp(self.norm(x)))
