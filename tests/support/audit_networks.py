"""Columns with convolutions for tests of audits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from torch import Tensor, nn

from revnets.analysis.audit_report import Audit
from revnets.engine.cell import Cell, Gain
from revnets.engine.columns import ReversibleColumns
from revnets.engine.graph import STEM, wire

DIMS = (5, 7, 11)


class ConvLevel(nn.Module):
    """F_t on NHWC images of one size: projected inputs are summed, then a depthwise convolution and an MLP."""

    def __init__(self, dim: int, read_dims: list[int], drop: float = 0.0, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.fuse = nn.ModuleList(nn.Linear(read_dim, dim) for read_dim in read_dims)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm = norm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim), nn.Dropout(drop))

    def forward(self, *reads: Tensor) -> Tensor:
        x = sum(fuse(read) for fuse, read in zip(self.fuse, reads, strict=True))
        y = self.conv(x.movedim(-1, 1)).movedim(1, -1)
        return x + self.mlp(self.norm(y.flatten(0, -2)).view(y.shape))


def conv_columns(columns: int, gain: float = 0.55, make: Callable[..., nn.Module] = ConvLevel, **options):
    m = len(DIMS)
    graph = wire(columns * m, m, [("below", "above")] * m)
    cells = []
    for node in graph.nodes:
        dims = [DIMS[0] if read == STEM else DIMS[read % m] for read in node.reads]
        level = make(DIMS[node.level], dims, **options)
        cells.append(Cell(level, None if node.residual is None else Gain(DIMS[node.level], gain)))
    return ReversibleColumns(graph, cells)


class Net(nn.Module):
    """A stem, columns and a head on the last level."""

    def __init__(self, columns: ReversibleColumns):
        super().__init__()
        self.stem = nn.Conv2d(3, DIMS[0], 3, padding=1)
        self.columns = columns
        self.head = nn.Linear(DIMS[-1], 4)

    def forward(self, image: Tensor) -> Tensor:
        levels = self.columns(self.stem(image).movedim(1, -1).contiguous())
        return self.head(levels[-1].mean((1, 2)))


def stem_output(batch: int = 2) -> Tensor:
    return torch.randn(batch, 6, 6, DIMS[0])


def by_mode(result: Audit) -> dict:
    return {mode.mode: mode for mode in result.modes}


def render(result: Audit, color: bool = False) -> str:
    console = Console(width=80, force_terminal=color, color_system="standard" if color else None, record=True)
    with console.capture() as capture:
        console.print(result.table())
    return capture.get()
