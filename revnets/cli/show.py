"""The command `show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

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


def describe(
    source: str, overrides: Sequence[str], shape: tuple[int, ...] | None, pictures: Sequence[Path], trust: bool = False
) -> None:
    """Print levels, connections, parameters and multiply-accumulates of a model, and write figures of its graph.

    Args:
        source: Model, as in `load_model`.
        overrides: Overrides `key=value`.
        shape: Shape of one sample, or None for that of the model.
        pictures: Files for the figure.
        trust: Whether a YAML file may name classes of other projects.
    """
    with torch.device("meta"):
        net = load_model(source, overrides, trust=trust)
    if not isinstance(getattr(net, "spec", None), NetSpec):
        raise SpecError(
            source, "", f"{type(net).__name__} has no specification", "Give a YAML file, or use audit", code="no-spec"
        )
    net = cast(Net, net)  # or a model with the same attributes
    shape = shape or sample_shape_of(net, source)
    macs, sizes = _walk(net, shape, source)
    console = Console()
    console.print(_levels(net, sizes))
    if (table := _down(net)) is not None:
        console.print(table)
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
    """Return the number of parameters of a module, 0 for None."""
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


def _walk(net: Net, shape: tuple[int, ...], source: str) -> tuple[int, list[str]]:
    """Return the multiply-accumulates of one sample and the size of each level, on the meta device."""
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
    spec = net.spec
    down = spec.directions.count("down")
    title = f"{spec.columns} column{'s' * (spec.columns > 1)} of {len(spec.levels)} levels, "
    title += f"{f'{down} of them down, ' if down else ''}memory {spec.memory}"
    table = Table(title=title, title_justify="left")
    for name in ("level", "channels", "positions", "blocks", "inputs", "parameters\nper column"):
        table.add_column(name, justify="left" if name in ("blocks", "inputs") else "right")
    # The first column has neither gains nor inputs from above.
    column = 1 if spec.columns > 1 and spec.directions[1] == "up" else 0
    for index, level in enumerate(spec.levels):
        what = f"{level.depth} x {level.block}"
        table.add_row(str(index), str(level.dim), sizes[index], what, *_cell(net, column, index))
    return table


def _down(net: Net) -> Table | None:
    """Return the levels of a column that runs down, if any: the second one, which follows another one."""
    columns = [column for column, direction in enumerate(net.spec.directions) if direction == "down"]
    if not columns:
        return None
    table = Table(title="columns that run down", title_justify="left")
    for name in ("level", "inputs", "parameters\nper column"):
        table.add_column(name, justify="left" if name == "inputs" else "right")
    for level in reversed(range(net.columns.graph.m)):
        table.add_row(str(level), *_cell(net, columns[min(1, len(columns) - 1)], level))
    return table


def _cell(net: Net, column: int, level: int) -> tuple[str, str]:
    """Return the inputs of a cell and its number of parameters."""
    graph = net.columns.graph
    node = graph.nodes[graph.states_of(column)[level]]
    reads = [
        graph.name(read) if read == STEM else f"{graph.kind(node, read)} {graph.name(read)}" for read in node.reads
    ]
    return ", ".join([*reads, *["constant"] * node.constant]), _millions(parameters(net.columns.flat()[node.index]))


def _wires(net: Net) -> Table:
    """Return the cells of the first columns, the last one and those where the direction changes."""
    graph, directions = net.columns.graph, net.spec.directions
    constant = {node.column for node in graph.nodes if node.constant}
    hidden = {
        column
        for column in range(3, graph.columns - 1)
        if len(set(directions[column - 2 : column + 1])) == 1 and column not in constant
    }
    table = Table(title="graph", title_justify="left")
    for name in ("cell", "inputs", "gamma scales"):
        table.add_column(name)
    for node, row in zip(graph.nodes, graph.table(), strict=True):
        starts, ends = node.index % graph.m == 0, (node.index + 1) % graph.m == 0
        if node.column not in hidden:
            table.add_row(*row, end_section=ends)
        elif starts and node.column - 1 not in hidden:
            table.add_row("...", "...", "...", end_section=True)
    return table


def _millions(count: int) -> str:
    return f"{count / 1e6:.3f} M" if count >= 1e5 else f"{count:,}"
