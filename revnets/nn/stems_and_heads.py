"""Stems and heads: the components before the first column and after the last one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from revnets.config.registry import register_head, register_stem
from revnets.nn.blocks import EPS, Count, Rate, init_weights


@register_stem("patchify")
class PatchifyStem(nn.Module):
    """Non-overlapping patches: strided convolution, then LayerNorm (RevCol, section 2.2.1).

    Args:
        dim: Channels of the output.
        in_chans: Channels of the images.
        patch: Kernel size and stride.

    Attributes:
        example_shape: Shape of one sample, without the batch axis.
    """

    def __init__(self, dim: int, in_chans: Count = 3, patch: Count = 4):
        super().__init__()
        self.patch = patch
        self.example_shape = (in_chans, 56 * patch, 56 * patch)
        self.conv = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to (B, H // patch, W // patch, dim), ignoring the rest at the right and bottom."""
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


@register_stem("tokens")
class TokenStem(nn.Module):
    """A sequence of patches with learned position embeddings (Dosovitskiy et al., 2021).

    Args:
        dim: Channels of the output.
        img_size: Height and width of the images, a multiple of `patch`.
        in_chans: Channels of the images.
        patch: Kernel size and stride.

    Attributes:
        example_shape: Shape of one sample, without the batch axis.

    Raises:
        ArgumentError: `img_size` is not a multiple of `patch`.
    """

    def __init__(self, dim: int, img_size: Count, in_chans: Count = 3, patch: Count = 16):
        super().__init__()
        if img_size % patch:
            raise ArgumentError(
                f"img_size {img_size} is not a multiple of patch {patch}. Change one of them",
                "img_size",
                code="not-divisible",
            )
        self.img_size = img_size
        self.example_shape = (in_chans, img_size, img_size)
        self.conv = nn.Conv2d(in_chans, dim, patch, stride=patch)
        self.pos_embed = nn.Parameter(torch.zeros((img_size // patch) ** 2, dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_chans, img_size, img_size) to (B, N, dim), N = (img_size / patch)^2.

        Raises:
            ArgumentError: If the images have another size.
        """
        if x.shape[-2:] != (self.img_size, self.img_size):
            height, width = x.shape[-2:]
            raise ArgumentError(
                f"got images of {height} x {width}, but the position embeddings are for img_size {self.img_size}",
                "img_size",
                code="shape-mismatch",
            )
        return self.conv(x).flatten(2).transpose(1, 2) + self.pos_embed


@register_stem("linear")
class LinearStem(nn.Module):
    """Linear layer for vectors or sequences of vectors.

    Args:
        dim: Channels of the output.
        in_dim: Channels of the input.

    Attributes:
        example_shape: Shape of one sample, without the batch axis.
    """

    def __init__(self, dim: int, in_dim: Count):
        super().__init__()
        self.example_shape = (in_dim,)
        self.linear = nn.Linear(in_dim, dim)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_dim) to (..., dim)."""
        return self.linear(x)


@register_head("classifier")
class ClassifierHead(nn.Module):
    """Classifier on the top level: mean over all positions, LayerNorm, Linear.

    Args:
        dims: Channels of all levels.
        num_classes: Number of classes.
        dropout: Rate before the linear layer.
    """

    def __init__(self, dims: Sequence[int], num_classes: Count, dropout: Rate = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(dims[-1], eps=EPS)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(dims[-1], num_classes)
        self.apply(init_weights)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Map states of all levels, the last one (B, ..., C), to logits (B, num_classes)."""
        top = levels[-1]
        return self.fc(self.drop(self.norm(top.flatten(1, -2).mean(1) if top.dim() > 2 else top)))
