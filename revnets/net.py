"""From a specification to a module: stem, columns, head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from revnets.cell import Cell, FixedGain, Gain
from revnets.columns import ReversibleColumns
from revnets.config import Source as ConfigSource
from revnets.config import SpecError
from revnets.fusions import Source
from revnets.graph import STEM, Graph, Node
from revnets.registry import find, options
from revnets.spec import LevelSpec, NetSpec, load_spec


class Level(nn.Module):
    """F_t: a fusion of the reads, then blocks."""

    def __init__(self, fusion: nn.Module, blocks: Sequence[nn.Module]):
        super().__init__()
        self.fusion = fusion
        self.blocks = nn.ModuleList(blocks)

    def forward(self, *reads: Tensor, **context: Any) -> Tensor:
        x = self.fusion(*reads)
        for block in self.blocks:
            x = block(x, **context)
        return x


class Net(nn.Module):
    """Stem, reversible columns and head as one module.

    Returns what the head gives, or the list of the last column's states if there is none. With taps in the spec it
    returns the pair (that, list of tapped states).
    """

    def __init__(self, spec: NetSpec, stem: nn.Module, columns: ReversibleColumns, head: nn.Module | None):
        super().__init__()
        self.spec = spec
        self.stem = stem
        self.columns = columns
        self.head = head

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        if self.spec.taps:
            levels, tapped = self.columns(x, taps=self.spec.taps)
            return (levels if self.head is None else self.head(levels)), tapped
        levels = self.columns(x)
        return levels if self.head is None else self.head(levels)


def build(source: ConfigSource | NetSpec, overrides: Sequence[str] = ()) -> Net:
    """Build the net that a YAML file, a dict or a spec describes.

    Raises:
        revnets.SpecError: the spec is wrong, or a part refuses its options.
    """
    spec = load_spec(source, overrides)
    name = "spec" if isinstance(source, NetSpec) else "dict" if not isinstance(source, str) else source
    dims = [level.dim for level in spec.levels]
    with _blamed(str(name), "stem"):
        stem = find("stem", spec.stem.type)(dim=dims[0], **spec.stem.options)
    columns = build_columns(spec, str(name))
    head = None
    if spec.head is not None:
        with _blamed(str(name), "head"):
            head = find("head", spec.head.type)(dims=dims, **spec.head.options)
    return Net(spec, stem, columns, head)


def build_columns(spec: NetSpec, name: str = "spec") -> ReversibleColumns:
    """Only the columns of a net, for hosts that bring a stem and a head of their own."""
    graph, reductions = spec.graph(), spec.reductions()
    rates = _drop_path_rates(spec)
    cells = []
    for node in graph.nodes:
        level = spec.levels[node.level]
        with _blamed(name, "fusion"):
            fusion = find("fusion", spec.fusion.type)(
                dim=level.dim,
                reduction=reductions[node.level],
                sources=[_source(spec, graph, node, read, reductions) for read in node.reads],
                **spec.fusion.options,
            )
        with _blamed(name, f"levels.{node.level}"):
            blocks = [_block(level, rate) for rate in rates[node.level]]
        cells.append(Cell(Level(fusion, blocks), _gain(spec, node, level.dim)))
    return ReversibleColumns(graph, cells, spec.memory)


def _source(spec: NetSpec, graph: Graph, node: Node, read: int, reductions: list[int]) -> Source:
    kind = graph.kind(node, read)
    if read == STEM:
        return Source(kind, spec.levels[0].dim, 1)
    return Source(kind, spec.levels[read % graph.m].dim, reductions[read % graph.m])


def _block(level: LevelSpec, rate: float) -> nn.Module:
    extra = {"drop_path": rate} if rate and "drop_path" not in level.options else {}
    return find("block", level.block)(dim=level.dim, **level.options, **extra)


def _gain(spec: NetSpec, node: Node, dim: int) -> Gain | FixedGain | None:
    if node.residual is None:
        return None
    return Gain(dim, spec.gain.init, spec.gain.min_abs) if spec.gain.learn else FixedGain(spec.gain.init)


def _drop_path_rates(spec: NetSpec) -> list[list[float]]:
    """Rates rise linearly inside a column and are the same in every column, as in the official release."""
    depths = [level.depth for level in spec.levels]
    rates = iter(torch.linspace(0, spec.drop_path, max(sum(depths), 1), device="cpu").tolist())
    takes = ["drop_path" in options("block", level.block) for level in spec.levels]
    return [
        [rate if takes[index] else 0.0 for rate in (next(rates) for _ in range(depth))]
        for index, depth in enumerate(depths)
    ]


@contextmanager
def _blamed(source: str, key: str) -> Iterator[None]:
    """A part that refuses its arguments is a mistake in the spec: say where."""
    try:
        yield
    except SpecError:
        raise
    except (ValueError, TypeError) as error:
        raise SpecError(source, key, str(error).rstrip("."), "") from error


