"""Fusions: how a cell converts its inputs to one shape and adds them (RevCol, section 2.2.2 and Figure 2c).

A fusion is called with the inputs in order. `sources` describes each of them: where it comes from, its number of
channels, and its reduction of the resolution relative to the stem's output.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from revnets.config.registry import register_fusion
from revnets.nn.blocks import EPS, conv2d, init_weights


class Source(NamedTuple):
    """One input of a fusion.

    Attributes:
        kind: `stem`, `below` or `above`.
        dim: Number of channels.
        reduction: Of height and width, relative to the stem's output.
    """

    kind: str
    dim: int
    reduction: int


class Down(nn.Module):
    """Strided convolution, then LayerNorm (ConvNeXt has the reverse order). Incomplete windows are padded with zeros.

    Args:
        dim_in: Channels of the input.
        dim: Channels of the output.
        ratio: Kernel size and stride.
    """

    def __init__(self, dim_in: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(dim_in, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim_in) to (B, ceil(H / ratio), ceil(W / ratio), dim)."""
        bottom, right = -x.shape[1] % self.ratio, -x.shape[2] % self.ratio
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return self.norm(conv2d(x, self.conv))


class Up(nn.Module):
    """Linear and LayerNorm at the low resolution, then nearest-neighbor upsampling.

    Args:
        dim_in: Channels of the input.
        dim: Channels of the output.
        ratio: Factor of height and width.
    """

    def __init__(self, dim_in: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.proj = Project(dim_in, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, dim_in) to (B, H * ratio, W * ratio, dim)."""
        x = self.proj(x).permute(0, 3, 1, 2)
        size = (x.shape[2] * self.ratio, x.shape[3] * self.ratio)
        # On the CPU, its backward is ten times as fast as the sum that an expanded view needs.
        return F.interpolate(x, size).permute(0, 2, 3, 1)


class Project(nn.Module):
    """Linear and LayerNorm over the channels.

    Args:
        dim_in: Channels of the input.
        dim: Channels of the output.
        norm: Whether to apply LayerNorm.
    """

    def __init__(self, dim_in: int, dim: int, norm: bool = True):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim_in) to (..., dim)."""
        return self.norm(self.linear(x))


@register_fusion("convnext")
class ConvNeXtFusion(nn.Module):
    """Hierarchical fusion: the sum of finer inputs after strided convolutions and coarser inputs after upsampling.

    An input that already has the shape of the level, such as the stem's output at level 0, is unchanged. Downsampling
    rounds odd sizes up, and upsampled inputs are cropped to the smallest size.

    Args:
        dim: Channels of the level.
        reduction: Of the level's resolution, relative to the stem's output.
        sources: The inputs, in order.
        stepwise: Downsample in several steps of 2, as in HRNet (Wang et al., 2019).
    """

    default_stride = 2

    def __init__(self, dim: int, reduction: int, sources: list[Source], stepwise: bool = False):
        super().__init__()
        self.stepwise = stepwise
        self.paths = nn.ModuleList(self._path(dim, reduction, source) for source in sources)
        self.resamples = any(source.reduction != reduction for source in sources)
        self.apply(init_weights)

    def _path(self, dim: int, reduction: int, source: Source) -> nn.Module:
        if source.reduction < reduction:
            ratio, steps = reduction // source.reduction, []
            while self.stepwise and ratio % 2 == 0 and ratio > 2:
                steps.append(Down(source.dim, source.dim, 2))
                ratio //= 2
            last = Down(source.dim, dim, ratio)
            return nn.Sequential(*steps, last) if steps else last
        if source.reduction > reduction:
            return Up(source.dim, dim, source.reduction // reduction)
        return nn.Identity() if source.dim == dim else Project(source.dim, dim)

    def forward(self, *reads: Tensor) -> Tensor:
        """Map inputs (B, H', W', C') to their sum (B, H, W, dim).

        Raises:
            ArgumentError: If the inputs need resampling, but are not images.
        """
        if not self.resamples:
            return sum_up(path(read) for path, read in zip(self.paths, reads, strict=True))
        for read in reads:
            if read.dim() != 4:
                raise ArgumentError(
                    f"fusion convnext resamples images (B, H, W, C), but an input has shape {tuple(read.shape)}. For "
                    "vectors and tokens choose fusion linear",
                    "reads",
                    code="shape-mismatch",
                )
        outs = [path(read) for path, read in zip(self.paths, reads, strict=True)]
        h = min(out.shape[1] for out in outs)  # upsampling a rounded-up size exceeds the level's size
        w = min(out.shape[2] for out in outs)
        return sum_up(out[:, :h, :w] for out in outs)


@register_fusion("linear")
class LinearFusion(nn.Module):
    """Isotropic fusion: the sum of projected inputs (Linear and LayerNorm) and unchanged inputs.

    Args:
        dim: Channels of the level.
        reduction: Of the level's resolution, relative to the stem's output.
        sources: The inputs, in order.
        project: Kinds of inputs to project. Inputs with another number of channels are always projected.
        norm: Whether projections include LayerNorm.

    Raises:
        ArgumentError: If the inputs have another resolution than the level.
    """

    default_stride = 1

    def __init__(
        self,
        dim: int,
        reduction: int,
        sources: list[Source],
        project: tuple[Literal["stem", "below", "above"], ...] = ("below", "above"),
        norm: bool = True,
    ):
        super().__init__()
        _same_resolution(reduction, sources)
        self.paths = nn.ModuleList(
            Project(source.dim, dim, norm) if source.kind in project or source.dim != dim else nn.Identity()
            for source in sources
        )
        self.apply(init_weights)

    def forward(self, *reads: Tensor) -> Tensor:
        """Map inputs (..., C') to their sum (..., dim)."""
        return sum_up(path(read) for path, read in zip(self.paths, reads, strict=True))


@register_fusion("identity")
class IdentityFusion(nn.Module):
    """Parameter-free sum of inputs of equal shape (RevNet, RevViT).

    Args:
        dim: Channels of the level.
        reduction: Of the level's resolution, relative to the stem's output.
        sources: The inputs, in order.

    Raises:
        ArgumentError: If the inputs have another resolution or number of channels than the level.
    """

    default_stride = 1

    def __init__(self, dim: int, reduction: int, sources: list[Source]):
        super().__init__()
        _same_resolution(reduction, sources)
        for source in sources:
            if source.dim != dim:
                raise ArgumentError(
                    f"all inputs must have the {dim} channels of the level, but one has {source.dim}. "
                    "Choose fusion linear, or equal dims",
                    "sources",
                    code="shape-mismatch",
                )

    def forward(self, *reads: Tensor) -> Tensor:
        """Map inputs (..., dim) to their sum (..., dim)."""
        return sum_up(reads)


class WithConstant(nn.Module):
    """A fusion whose result is added to a learned constant, such as the mask tokens of a decoder.

    Args:
        fusion: Fusion of the inputs.
        shape: Shape of the constant: (dim,) for one vector at all positions, or (*positions, dim).
    """

    def __init__(self, fusion: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.fusion = fusion
        self.constant = nn.Parameter(torch.zeros(shape))
        nn.init.trunc_normal_(self.constant, std=0.02)

    def forward(self, *reads: Tensor) -> Tensor:
        """Map the inputs of the fusion to (B, *positions, dim).

        Raises:
            ArgumentError: If the constant has other positions than the level.
        """
        x, shape = self.fusion(*reads), self.constant.shape
        if len(shape) > 1 and shape != x.shape[1:]:
            raise ArgumentError(
                f"the constant has positions {tuple(shape[:-1])}, but the level has {tuple(x.shape[1:-1])}. "
                "Give those of the level, or none for one vector at all positions",
                "constant.positions",
                code="shape-mismatch",
            )
        return x + self.constant


def sum_up(terms: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors, without the initial 0 of `sum`."""
    terms = iter(terms)
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _same_resolution(reduction: int, sources: list[Source]) -> None:
    for source in sources:
        if source.reduction != reduction:
            raise ArgumentError(
                f"all inputs must have the resolution of the level, 1/{reduction} of the stem's, but one has "
                f"1/{source.reduction}. Choose fusion convnext, or stride 1 at every level",
                "sources",
                code="shape-mismatch",
            )
