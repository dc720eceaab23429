"""From a specification to a module: stem, columns, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revnets.config.errors import ArgumentError, SpecError
from revnets.config.loader import Source as ConfigSource
from revnets.config.memory_budget import BudgetSpec
from revnets.config.net_spec import ColumnsSpec, NetSpec, load_spec
from revnets.config.registry import find_component
from revnets.engine.cell import Cell, FixedGain, Gain
from revnets.engine.columns import ReversibleColumns
from revnets.engine.graph import STEM, Graph, Node
from revnets.nn.fusions import Source, WithConstant

NetOutput = Tensor | list[Tensor] | tuple[Tensor | list[Tensor], list[Tensor]]
"""What a net gives: with a head its result, without one the last column's states; with taps a pair (that, taps)."""
BUGS = (AssertionError, AttributeError, ImportError, LookupError, NameError)
"""Errors that no option of a component of this package causes, so that a specification is not to blame."""


class Level(nn.Module):
    """F_t: a fusion of the reads, then blocks.

    Args:
        fusion: brings the reads to one state with `dim` channels.
        blocks: keep the state's shape.
        name: of the cell, for error messages.
    """

    def __init__(self, fusion: nn.Module, blocks: Sequence[nn.Module], dim: int, name: str):
        super().__init__()
        self.fusion = fusion
        self.blocks = nn.ModuleList(blocks)
        self.dim = dim
        self.name = name

    def forward(self, *reads: Tensor, **context: Any) -> Tensor:
        """States (B, ..., C) of the reads to (B, ..., dim).

        Raises:
            ArgumentError: a part gives another shape than its neighbours rely on.
        """
        x = self.fusion(*reads)
        if x.shape[-1] != self.dim:
            raise ArgumentError(
                f"cell {self.name}: the fusion {type(self.fusion).__name__} gives shape {tuple(x.shape)}, but the "
                f"level has dim {self.dim}. Channels are the last axis; is it the stem that gives another number?",
                self.name,
                code="shape-mismatch",
            )
        for index, block in enumerate(self.blocks):
            y = block(x, **context)
            if y.shape != x.shape:
                raise ArgumentError(
                    f"cell {self.name}: block {index} ({type(block).__name__}) makes {tuple(y.shape)} out of "
                    f"{tuple(x.shape)}. A block must keep the shape; resolution and dim change between levels, in "
                    "the fusion",
                    self.name,
                    code="shape-mismatch",
                )
            x = y
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
        if isinstance(spec.memory, BudgetSpec):
            from revnets.memory.auto_budget import keep_budget  # with the planner, which no other net needs

            keep_budget(self, spec.memory)

    def forward(self, x: Tensor) -> NetOutput:
        x = self.stem(x)
        if self.spec.taps:
            levels, tapped = self.columns(x, taps=self.spec.taps)
            return (levels if self.head is None else self.head(levels)), tapped
        levels = self.columns(x)
        return levels if self.head is None else self.head(levels)

    def twin(self) -> Net:
        """The same net without values, on the meta device; what is frozen here is frozen there."""
        with torch.device("meta"):
            other = build(self.spec)
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return other


def build(source: ConfigSource | NetSpec, overrides: Sequence[str] = (), *, trust: bool = True) -> Net:
    """Build the net that a YAML file, a dict or a spec describes.

    Args:
        source, overrides: as in `load_spec`.
        trust: may it name classes of other projects? Their modules are imported and their constructors called.

    Raises:
        revnets.SpecError: the spec is wrong, not trusted, or a part refuses its options.
    """
    spec = load_spec(source, overrides, trust=trust)
    name = "spec" if isinstance(source, NetSpec) else "dict" if isinstance(source, Mapping) else str(source)
    stem = build_stem(spec, name)
    columns = build_columns(spec, name)
    dims = [level.dim for level in spec.levels]
    head = spec.head and _part(name, "head", "head", spec.head.type, dims=dims, **spec.head.options)
    return Net(spec, stem, columns, head)


def build_stem(spec: NetSpec, name: str = "spec", **options: Any) -> nn.Module:
    """Only the stem of a net.

    Args:
        name: of the spec, for error messages.
        options: replace those of the spec.

    Raises:
        revnets.SpecError: the stem refuses its options.
    """
    return _part(name, "stem", "stem", spec.stem.type, dim=spec.levels[0].dim, **{**spec.stem.options, **options})


def build_columns(spec: ColumnsSpec, name: str = "spec") -> ReversibleColumns:
    """Only the columns of a net, for hosts that bring a stem and a head of their own.

    A budget is left to the host: `revnets.keep_budget(host, spec.memory)`. Until then the columns run in `exact`, and
    warn in training that it is pending.

    Args:
        name: of the spec, for error messages.

    Raises:
        revnets.SpecError: a part refuses its options.
    """
    graph, reductions, rates = spec.graph(), spec.reductions(), spec.drop_path_rates()
    cells = []
    for node in graph.nodes:
        level = spec.levels[node.level]
        sources = [_source(spec, graph, node, read, reductions) for read in node.reads]
        given = {"dim": level.dim, "reduction": reductions[node.level], "sources": sources}
        fusion = _part(name, "fusion", "fusion", spec.fusion.type, **given, **spec.fusion.options)
        if node.constant and spec.constant is not None:
            fusion = WithConstant(fusion, (*spec.constant.positions, level.dim))
        blocks = [_block(name, node.level, spec, rate) for rate in rates[node.level]]
        cells.append(Cell(Level(fusion, blocks, level.dim, graph.name(node.index)), _gain(spec, node, level.dim)))
    if not isinstance(spec.memory, BudgetSpec):
        return ReversibleColumns(graph, cells, spec.memory, spec.verify)
    columns = ReversibleColumns(graph, cells, "exact", spec.verify)
    columns.budget = spec.memory
    return columns


def _source(spec: ColumnsSpec, graph: Graph, node: Node, read: int, reductions: list[int]) -> Source:
    kind = graph.kind(node, read)
    if read == STEM:
        return Source(kind, spec.levels[0].dim, 1)
    level = graph.nodes[read].level
    return Source(kind, spec.levels[level].dim, reductions[level])


def _block(name: str, index: int, spec: ColumnsSpec, rate: float) -> nn.Module:
    level = spec.levels[index]
    options = spec.block_options(level)
    options = {"drop_path": rate, **options} if rate else options
    return _part(name, f"levels.{index}", "block", level.block, dim=level.dim, **options)


def _gain(spec: ColumnsSpec, node: Node, dim: int) -> Gain | FixedGain | None:
    if node.residual is None:
        return None
    return Gain(dim, spec.gain.init, spec.gain.min_abs) if spec.gain.learn else FixedGain(spec.gain.init)


def _part(source: str, key: str, kind: str, name: str, /, **arguments: Any) -> nn.Module:
    """Build one part. If it refuses its arguments, that is a mistake in the spec: say where."""
    who = f'"{name}"' if key == kind else f'{kind} "{name}"'
    factory = find_component(kind, name)
    try:
        part = factory(**arguments)
    except Exception as error:  # anything that a class of the user's may raise
        if isinstance(error, BUGS) and factory.__module__.startswith("revnets."):
            raise
        said = next(iter(str(error).splitlines()), "")
        if not isinstance(error, ValueError):
            said = f"{type(error).__name__}: {said}"
        code = error.code if isinstance(error, ArgumentError) else "component-failed"
        raise SpecError(source, key, f"{who}: {said}", code=code) from error
    if not isinstance(part, nn.Module):
        raise SpecError(
            source,
            key,
            f"{who} gives a {type(part).__name__}",
            "It must give a torch.nn.Module",
            code="invalid-component",
        )
    return part
