"""Small networks with blocks of many kinds, connected to columns of tokens or images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnets.engine.cell import Cell, FixedGain, Gain
from revnets.engine.columns import ReversibleColumns
from revnets.engine.graph import STEM, Node, ReadToken, wire

REVCOL = ("below", "above")


# -------------------------------------------------------------- blocks: (B, N, C) -> (B, N, C), built for one dim


class Mlp(nn.Sequential):
    def __init__(self, dim: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))


class Attention(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unsqueeze(1) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))


class Conv(nn.Module):
    """A depthwise convolution along the tokens: its operands are permuted views."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(dim, dim, 3, padding=1, groups=dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.silu(self.conv(x.transpose(1, 2)).transpose(1, 2)))


class Dropout(nn.Sequential):
    def __init__(self, dim: int):
        super().__init__(nn.Linear(dim, dim), nn.Dropout(0.3), nn.Tanh(), nn.Linear(dim, dim))


class DropPath(nn.Module):
    """Drops the block for some of the samples (stochastic depth)."""

    def __init__(self, dim: int):
        super().__init__()
        self.block = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.block(x)
        keep = torch.empty(x.shape[0], 1, 1, dtype=x.dtype).bernoulli_(0.7)
        return self.block(x) * keep / 0.7


class BatchNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.linear(x).flatten(0, 1)).view_as(x))


class InPlace(nn.Module):
    """In-place operations on intermediate tensors, as in many released blocks."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y.mul_(0.5)
        y += x
        return y.relu_()


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "mlp": Mlp,
    "attention": Attention,
    "conv": Conv,
    "dropout": Dropout,
    "droppath": DropPath,
    "batchnorm": BatchNorm,
    "inplace": InPlace,
}
STEADY = ("mlp", "attention", "conv", "inplace")
"""Deterministic blocks."""


# -------------------------------------------------------------------------------------------------- fusions, networks


class TokenFunction(nn.Module):
    """F_t on tokens (B, N, C): inputs are projected, resampled to this level and summed, followed by a block."""

    def __init__(self, block: nn.Module, dim: int, length: int, read_dims: Sequence[int]):
        super().__init__()
        self.fuse = nn.ModuleList(nn.Linear(read_dim, dim) for read_dim in read_dims)
        self.block = block
        self.length = length

    def forward(self, *reads: Tensor) -> Tensor:
        x = sum(_resample(linear(read), self.length) for linear, read in zip(self.fuse, reads, strict=True))
        return x + self.block(x)


def _resample(x: Tensor, length: int) -> Tensor:
    if x.shape[1] > length:
        return x.unflatten(1, (length, -1)).mean(2)
    return x.repeat_interleave(length // x.shape[1], dim=1)


class ImageFunction(nn.Module):
    """F_t on images (B, H, W, C): strided convolutions from below, nearest upsampling from above, channels last."""

    def __init__(self, dim: int, side: int, read_dims: Sequence[int], read_sides: Sequence[int]):
        super().__init__()
        self.side = side
        self.fuse = nn.ModuleList()
        for read_dim, read_side in zip(read_dims, read_sides, strict=True):
            step = max(1, read_side // side)
            self.fuse.append(nn.Conv2d(read_dim, dim, step, step))
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mlp = Mlp(dim)

    def forward(self, *reads: Tensor) -> Tensor:
        x: Any = 0
        for conv, read in zip(self.fuse, reads, strict=True):
            x = x + F.interpolate(conv(read.permute(0, 3, 1, 2)), size=(self.side, self.side))
        return (x + self.mlp(self.depthwise(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def fixed(value: float) -> Callable[[int], FixedGain]:
    return lambda dim: FixedGain(value)


def token_net(
    m: int = 3,
    columns: int = 4,
    blocks: Sequence[str] = ("mlp",),
    reads: Sequence[Sequence[ReadToken]] | None = None,
    gamma: float | Callable[[int], nn.Module] = 0.5,
    dims: Sequence[int] | None = None,
    halve: bool = True,
    memory: str | Sequence[str] = "exact",
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    seed: int = 0,
    directions: Sequence[str] | None = None,
) -> ReversibleColumns:
    """Columns of m levels of shape (B, N / 2^l, dims[l]), N = 2^(m-1) (or N throughout without `halve`).

    Args:
        blocks: Names from `BLOCKS`. Cell t gets block t modulo their number.
        reads: Inputs of each level, by default `below` and `above` as in RevCol.
        gamma: Initial value of learned gains, or a function dim -> gain.
        scale: Factor for all initial weights. Values below 1 make the outputs of cells smaller.
        directions: Directions of the columns, by default up.
    """
    torch.manual_seed(seed)
    dims = list(dims or (5 + 2 * level for level in range(m)))
    lengths = [2 ** (m - 1 - (level if halve else 0)) for level in range(m)]
    make_gain = gamma if callable(gamma) else lambda dim: Gain(dim, gamma)
    graph = wire(m * columns, m, reads or [REVCOL] * m, directions=directions)

    def make(node: Node) -> Cell:
        dim = dims[node.level]
        read_dims = [dims[0] if read == STEM else dims[graph.nodes[read].level] for read in node.reads]
        block = BLOCKS[blocks[node.index % len(blocks)]](dim)
        gain = None if node.residual is None else make_gain(dim)
        return Cell(TokenFunction(block, dim, lengths[node.level], read_dims), gain)

    net = ReversibleColumns(graph, [make(node) for node in graph.nodes], memory).to(dtype)
    with torch.no_grad():
        for cell in net.flat():
            for parameter in cell.function.parameters():
                parameter.mul_(scale)
            if isinstance(cell.gain, Gain):  # gains differ between channels
                cell.gain.weight.mul_(1 + 0.1 * torch.rand_like(cell.gain.weight))
    return net


def image_net(m: int = 3, columns: int = 3, side: int = 8, gamma: float = 0.5, seed: int = 0) -> ReversibleColumns:
    """Columns of m levels of shape (B, side / 2^l, side / 2^l, 4 + 3 l)."""
    torch.manual_seed(seed)
    dims, sides = [4 + 3 * level for level in range(m)], [side // 2**level for level in range(m)]
    graph = wire(m * columns, m, [REVCOL] * m)
    cells = []
    for node in graph.nodes:
        levels = [0 if read == STEM else read % m for read in node.reads]
        function = ImageFunction(
            dims[node.level], sides[node.level], [dims[level] for level in levels], [sides[level] for level in levels]
        )
        cells.append(Cell(function, None if node.residual is None else Gain(dims[node.level], gamma)))
    return ReversibleColumns(graph, cells)


def stem_of(net: ReversibleColumns, batch: int = 2, seed: int = 1, grad: bool = True) -> Tensor:
    """Return a random input of the required shape and dtype."""
    generator = torch.Generator().manual_seed(seed)
    function = net.flat()[0].function
    dtype = next(net.parameters()).dtype
    if isinstance(function, ImageFunction):
        shape: tuple[int, ...] = (batch, function.side, function.side, function.fuse[0].in_channels)
    else:
        shape = (batch, function.length, function.fuse[0].in_features)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def cells_net(functions: list[nn.Module], m: int = 2, dim: int = 6, **options: Any) -> ReversibleColumns:
    """Return columns in which each cell has the previous one as input, with learned gains from the second column."""
    cells = [Cell(function, Gain(dim) if t >= m else None) for t, function in enumerate(functions)]
    return ReversibleColumns(wire(len(cells), m, [[1]] * m), cells, **options)


def tokens(dim: int = 6) -> Tensor:
    return torch.randn(3, 5, dim, requires_grad=True)
