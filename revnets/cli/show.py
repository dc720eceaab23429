"""What the commands `show`, `audit` and `plan` print and draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from revnets.cli.common import input_error, sample_shape_of, write_figure
from revnets.config.errors import SpecError
from revnets.config.net_spec import NetSpec
from revnets.engine.graph import STEM
from revnets.models.loading import load_model
from revnets.models.net import Net

if TYPE_CHECKING:
    pass


def describe(
    source: str, overrides: Sequence[str], shape: tuple[int, ...] | None, pictures: Sequence[Path], trust: bool = False
) -> None:
    """Print levels, wires, parameters and multiply-accumulates of a net; draw it into `pictures`.

    Args:
        trust: may a YAML file name classes of other projects?
    """
    with torch.device("meta"):
        net = load_model(source, overrides, trust=trust)
    if not isinstance(getattr(net, "spec", None), NetSpec):
        raise SpecError(
            source, "", f"{type(net).__name__} has no spec to show", "Give a YAML file, or use audit", code="no-spec"
        )
    net = cast(Net, net)  # or a model with the same parts
    shape = shape or sample_shape_of(net, source)
    macs, sizes = _walk(net, shape, source)
    console = Console()
    console.print(_levels(net, sizes))
    console.print(_wires(net))
    parts = [("stem", net.stem), ("columns", net.columns), ("head", net.head)]
    counts = ", ".join(f"{name} {_millions(parameters(part))}" for name, part in parts if part is not None)
    console.print(f"parameters {_millions(parameters(net))} ({counts})")
    count = f"{macs / 1e9:.3f} G" if macs >= 1e8 else f"{macs / 1e6:.3f} M"
    console.print(f"multiply-accumulates {count} for one sample of {' x '.join(map(str, shape))}")
    if pictures:
        from revnets.plotting.graph import graph_figure

        labels = [
            f"{level.dim} x {size}\n{level.depth} x {level.block.rpartition(':')[2]}"
            for level, size in zip(net.spec.levels, sizes, strict=True)
        ]
        figure = graph_figure(net.columns.graph, labels)
        for picture in pictures:
            write_figure(console, figure, picture)


def parameters(module: nn.Module | None) -> int:
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def _walk(net: Net, shape: tuple[int, ...], source: str) -> tuple[int, list[str]]:
    """Multiply-accumulates of one sample, and the size of each level, without computing anything."""
    sizes: list[str] = []

    def note(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        sizes.append(" x ".join(str(side) for side in output.shape[1:-1]) or "1")

    hooks = [cell.register_forward_hook(note) for cell in net.columns.flat()[: net.columns.graph.m]]
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, *shape, device="meta"))
    except (RuntimeError, ValueError) as error:
        raise input_error(source, shape, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2, sizes


def _levels(net: Net, sizes: Sequence[str]) -> Table:
    spec, graph = net.spec, net.columns.graph
    title = f"{spec.columns} column{'s' * (spec.columns > 1)} of {len(spec.levels)} levels, memory {spec.memory}"
    table = Table(title=title, title_justify="left")
    for name in ("level", "channels", "positions", "blocks", "reads", "parameters a column"):
        table.add_column(name, justify="left" if name in ("blocks", "reads") else "right")
    column = min(1, spec.columns - 1)  # the first one has neither gains nor reads from above
    for index, level in enumerate(spec.levels):
        node = graph.nodes[column * graph.m + index]
        reads = ", ".join(
            graph.name(read) if read == STEM else f"{graph.kind(node, read)} {graph.name(read)}" for read in node.reads
        )
        count = _millions(parameters(net.columns.flat()[node.index]))
        table.add_row(str(index), str(level.dim), sizes[index], f"{level.depth} x {level.block}", reads, count)
    return table


def _wires(net: Net, shown: int = 3) -> Table:
    """The first columns and the last; those between are wired like the second."""
    graph = net.columns.graph
    table = Table(title="graph", title_justify="left")
    for name in ("cell", "reads", "gamma scales"):
        table.add_column(name)
    for node, row in zip(graph.nodes, graph.table(), strict=True):
        hidden = shown <= node.column < graph.columns - 1
        if not hidden:
            table.add_row(*row, end_section=node.level == graph.m - 1)
        elif node.column == shown and node.level == 0:
            table.add_row("...", "...", "...", end_section=True)
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:.3f} M" if count >= 1e5 else f"{count:,}"
