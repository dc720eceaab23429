"""Fusions: how a cell brings its reads to one shape and adds them up (RevCol, section 2.2.2 and Figure 2c).

A fusion is called with the reads in order. It knows from `sources` where each comes from, how many channels it has
and by how much its resolution is reduced against the stem's output.
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
    """One read, as a fusion sees it."""

    kind: str  # stem, below or above
    dim: int  # channels
    reduction: int  # of each side, against the stem's output


class Down(nn.Module):
    """Strided convolution, then LayerNorm; the other way round than in ConvNeXt. Odd sides are padded by zeros."""

    def __init__(self, dim_in: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.conv = nn.Conv2d(dim_in, dim, ratio, stride=ratio)
        self.norm = nn.LayerNorm(dim, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        bottom, right = -x.shape[1] % self.ratio, -x.shape[2] % self.ratio
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return self.norm(conv2d(x, self.conv))


class Up(nn.Module):
    """Linear and LayerNorm at the low resolution, then nearest-neighbour upsampling."""

    def __init__(self, dim_in: int, dim: int, ratio: int):
        super().__init__()
        self.ratio = ratio
        self.proj = Project(dim_in, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x).permute(0, 3, 1, 2)
        size = (x.shape[2] * self.ratio, x.shape[3] * self.ratio)
        # In backward ten times as fast on the CPU as the sum that an expanded view would need.
        return F.interpolate(x, size).permute(0, 2, 3, 1)


class Project(nn.Module):
    """Linear and LayerNorm over the channels."""

    def __init__(self, dim_in: int, dim: int, norm: bool = True):
        super().__init__()
        self.linear = nn.Linear(dim_in, dim)
        self.norm = nn.LayerNorm(dim, eps=EPS) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


@register_fusion("convnext")
class ConvNeXtFusion(nn.Module):
    """Hierarchical fusion: strided convolution from finer reads, upsampling from coarser ones, summed.

    A read that already has the right shape, such as the stem's output at level 0, passes as it is. Odd sides are
    rounded up going down and cropped coming up, to the size of the finest read.
    Reads (B, H', W', C'), result (B, H, W, C).

    Args:
        stepwise: go down by steps of 2, as HRNet does (Wang et al., 2019), where a read is more than one step finer.
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
        if not self.resamples:
            return sum_up(path(read) for path, read in zip(self.paths, reads, strict=True))
        for read in reads:
            if read.dim() != 4:
                raise ArgumentError(
                    f"fusion convnext resamples images (B, H, W, C), but a read has shape {tuple(read.shape)}. For "
                    "vectors and tokens choose fusion linear",
                    "reads",
                    code="shape-mismatch",
                )
        outs = [path(read) for path, read in zip(self.paths, reads, strict=True)]
        h = min(out.shape[1] for out in outs)  # upsampling a rounded-up size overshoots
        w = min(out.shape[2] for out in outs)
        return sum_up(out[:, :h, :w] for out in outs)


@register_fusion("linear")
class LinearFusion(nn.Module):
    """Isotropic fusion: Linear and LayerNorm on the kinds of reads listed in `project`, others as they are, summed."""

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
        return sum_up(path(read) for path, read in zip(self.paths, reads, strict=True))


@register_fusion("identity")
class IdentityFusion(nn.Module):
    """The sum of the reads, without parameters; they must have equal shapes (RevNet, RevViT)."""

    default_stride = 1

    def __init__(self, dim: int, reduction: int, sources: list[Source]):
        super().__init__()
        _same_resolution(reduction, sources)
        for source in sources:
            if source.dim != dim:
                raise ArgumentError(
                    f"it adds reads as they are, but one has {source.dim} channels and the level {dim}. "
                    "Choose fusion linear, or equal dims",
                    "sources",
                    code="shape-mismatch",
                )

    def forward(self, *reads: Tensor) -> Tensor:
        return sum_up(reads)


class WithConstant(nn.Module):
    """A fusion, and a learned constant that is added to its result, such as the mask tokens of a decoder.

    Reads as of the fusion, result (B, positions, dim).

    Args:
        fusion: of the reads.
        shape: of the constant, (dim,) for one vector at all positions, or (positions, dim).
    """

    def __init__(self, fusion: nn.Module, shape: tuple[int, ...]):
        super().__init__()
        self.fusion = fusion
        self.constant = nn.Parameter(torch.zeros(shape))
        nn.init.trunc_normal_(self.constant, std=0.02)

    def forward(self, *reads: Tensor) -> Tensor:
        """Raises an `ArgumentError` if the positions of the constant are not those of the level."""
        x, shape = self.fusion(*reads), self.constant.shape
        if len(shape) > 1 and shape != x.shape[1:]:
            raise ArgumentError(
                f"the constant has positions {tuple(shape[:-1])}, but enters at {tuple(x.shape[1:-1])}. "
                "Give these, or none for one vector at all positions",
                "constant.positions",
                code="shape-mismatch",
            )
        return x + self.constant


def sum_up(terms: Iterable[Tensor]) -> Tensor:
    """The sum, without the 0 that `sum` begins with."""
    terms = iter(terms)
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _same_resolution(reduction: int, sources: list[Source]) -> None:
    for source in sources:
        if source.reduction != reduction:
            raise ArgumentError(
                f"it joins levels of one resolution, but reads 1/{source.reduction} into 1/{reduction} of the stem's. "
                "Choose fusion convnext, or stride 1 at every level",
                "sources",
                code="shape-mismatch",
            )
