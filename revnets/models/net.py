"""Builds a network from a specification: stem, columns and head."""

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
"""Output of a network: the result of its head, or the states of the last column if it has none. With taps, a pair of
that and the list of intermediate outputs."""

BUGS = (AssertionError, AttributeError, ImportError, LookupError, NameError)
"""Errors that indicate a bug in a component of this package, not a wrong specification."""


class Level(nn.Module):
    """The function F_t of a cell: a fusion of its inputs, then blocks.

    Args:
        fusion: Combines the inputs into one state with `dim` channels.
        blocks: Modules that keep the shape of the state.
        dim: Number of channels.
        name: Name of the cell in error messages.
    """

    def __init__(self, fusion: nn.Module, blocks: Sequence[nn.Module], dim: int, name: str):
        super().__init__()
        self.fusion = fusion
        self.blocks = nn.ModuleList(blocks)
        self.dim = dim
        self.name = name

    def forward(self, *reads: Tensor, **context: Any) -> Tensor:
        """Map input states (B, ..., C) to (B, ..., dim).

        Raises:
            ArgumentError: If the fusion or a block returns an invalid shape.
        """
        x = self.fusion(*reads)
        if x.shape[-1] != self.dim:
            raise ArgumentError(
                f"cell {self.name}: the fusion {type(self.fusion).__name__} returns shape {tuple(x.shape)}, but the "
                f"level has dim {self.dim}. Channels are the last axis; does the stem return another number?",
                self.name,
                code="shape-mismatch",
            )
        for index, block in enumerate(self.blocks):
            y = block(x, **context)
            if y.shape != x.shape:
                raise ArgumentError(
                    f"cell {self.name}: block {index} ({type(block).__name__}) changes shape {tuple(x.shape)} to "
                    f"{tuple(y.shape)}. A block must keep the shape; resolution and dim change between levels, in "
                    "the fusion",
                    self.name,
                    code="shape-mismatch",
                )
            x = y
        return x


class Net(nn.Module):
    """Stem, reversible columns and head as one module. `revnets.build` creates it from a specification.

    Args:
        spec: The specification.
        stem: Maps the input of the network to the input of the columns.
        columns: The reversible columns.
        head: Maps the list of the last column's states to the output; optional.

    Attributes:
        spec: The specification.
        stem: The stem.
        columns: The columns, whose attribute `memory` sets the memory mode.
        head: The head, or None.
    """

    def __init__(self, spec: NetSpec, stem: nn.Module, columns: ReversibleColumns, head: nn.Module | None):
        super().__init__()
        self.spec = spec
        self.stem = stem
        self.columns = columns
        self.head = head
        if isinstance(spec.memory, BudgetSpec):
            from revnets.memory.auto_budget import keep_budget  # imports the planner

            keep_budget(self, spec.memory)

    def forward(self, x: Tensor) -> NetOutput:
        """Run the network.

        Args:
            x: Input of the stem, batch first.

        Returns:
            The output of the head, or without a head the list of the last column's states, level 0 first. If the
            specification has `taps`, a pair of that and the list of intermediate outputs.
        """
        x = self.stem(x)
        if self.spec.taps:
            levels, tapped = self.columns(x, taps=self.spec.taps)
            return (levels if self.head is None else self.head(levels)), tapped
        levels = self.columns(x)
        return levels if self.head is None else self.head(levels)

    def twin(self) -> Net:
        """Return a copy on the meta device, without values. Frozen parameters are frozen in the copy, too."""
        with torch.device("meta"):
            other = build(self.spec)
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return other


def build(source: ConfigSource | NetSpec, overrides: Sequence[str] = (), *, trust: bool = True) -> Net:
    """Build a network from a specification.

    Args:
        source: A YAML file, a dict or a `NetSpec`.
        overrides: Items `key=value` that replace values, such as `columns=8`.
        trust: Whether the specification may name classes of other projects. Their modules are imported and their
            constructors are called.

    Returns:
        The network, with initialized weights.

    Raises:
        revnets.SpecError: If the specification is invalid or not trusted, or a component rejects its options.

    Example:
        >>> level = {"dim": 8, "depth": 1, "block": "mlp"}
        >>> spec = {"columns": 4, "stem": {"type": "linear", "in_dim": 16}, "levels": [level] * 3, "fusion": "linear"}
        >>> net = revnets.build(spec, ["memory=exact"])
        >>> levels = net(torch.randn(2, 16))
    """
    spec = load_spec(source, overrides, trust=trust)
    name = "spec" if isinstance(source, NetSpec) else "dict" if isinstance(source, Mapping) else str(source)
    stem = build_stem(spec, name)
    columns = build_columns(spec, name)
    dims = [level.dim for level in spec.levels]
    head = spec.head and _component(name, "head", "head", spec.head.type, dims=dims, **spec.head.options)
    return Net(spec, stem, columns, head)


def build_stem(spec: NetSpec, name: str = "spec", **options: Any) -> nn.Module:
    """Build the stem of a network.

    Args:
        spec: The specification.
        name: Name of the specification in error messages.
        options: Options that replace those of the specification.

    Raises:
        revnets.SpecError: If the stem rejects its options.
    """
    return _component(name, "stem", "stem", spec.stem.type, dim=spec.levels[0].dim, **{**spec.stem.options, **options})


def build_columns(spec: ColumnsSpec, name: str = "spec") -> ReversibleColumns:
    """Build only the columns, for a host model with a custom stem and head.

    If `spec.memory` is a budget, call `revnets.keep_budget(host, spec.memory)`. Until then the columns run in `exact`
    and warn in training that the budget is pending.

    Args:
        spec: The specification.
        name: Name of the specification in error messages.

    Returns:
        The columns. Their input has the channels of level 0.

    Raises:
        revnets.SpecError: If a component rejects its options.
    """
    graph, reductions, rates = spec.graph(), spec.reductions(), spec.drop_path_rates()
    cells = []
    for node in graph.nodes:
        level = spec.levels[node.level]
        sources = [_source(spec, graph, node, read, reductions) for read in node.reads]
        provided = {"dim": level.dim, "reduction": reductions[node.level], "sources": sources}
        fusion = _component(name, "fusion", "fusion", spec.fusion.type, **provided, **spec.fusion.options)
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
    return _component(name, f"levels.{index}", "block", level.block, dim=level.dim, **options)


def _gain(spec: ColumnsSpec, node: Node, dim: int) -> Gain | FixedGain | None:
    if node.residual is None:
        return None
    return Gain(dim, spec.gain.init, spec.gain.min_abs) if spec.gain.learn else FixedGain(spec.gain.init)


def _component(source: str, key: str, kind: str, name: str, /, **arguments: Any) -> nn.Module:
    """Build one component. If it rejects its arguments, raise a `SpecError` with the key of the specification."""
    title = f'"{name}"' if key == kind else f'{kind} "{name}"'
    factory = find_component(kind, name)
    try:
        component = factory(**arguments)
    except Exception as error:  # a custom class may raise anything
        if isinstance(error, BUGS) and factory.__module__.startswith("revnets."):
            raise
        message = next(iter(str(error).splitlines()), "")
        if not isinstance(error, ValueError):
            message = f"{type(error).__name__}: {message}"
        code = error.code if isinstance(error, ArgumentError) else "component-failed"
        raise SpecError(source, key, f"{title}: {message}", code=code) from error
    if not isinstance(component, nn.Module):
        message = f"{title} returns a {type(component).__name__}"
        raise SpecError(source, key, message, "It must return a torch.nn.Module", code="invalid-component")
    return component
