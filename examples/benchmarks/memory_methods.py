"""Compare methods to train in less memory, and memory planners, on RevCol-T-shaped columns and on 24 GPT-2 blocks.

    .venv/bin/python -m pip install --no-deps memcnn revlib momentumnet torch-kitsune   # missing packages are skipped
    .venv/bin/python examples/benchmarks/memory_methods.py --rounds 4 --markdown --png docs/assets/memory_methods.png
    .venv/bin/python examples/benchmarks/memory_methods.py --case columns --depth 2 --batch 2 --rounds 1   # a minute

The methods are those of `finetuning_ways.py`. For columns, a block is the function of a cell. For GPT-2, reversible
libraries from PyPI are included, each with its own function: x_t = x_{t-2} + G_t(x_{t-1}) - x_{t-1} for memcnn and
revlib (`RevNet`), a momentum of 0.9 for momentumnet. The numbers are those of `finetuning.py`: CPU seconds, saved
bytes, peak, gradient error. A second table compares the peaks predicted by `revnets.plan` and torch-kitsune with
measured peaks.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import finetuning
import torch
import torch._dynamo.config as dynamo_config
import torch.nn.functional as F
import typer
from _cli import listed, picture
from finetuning_ways import REWIRED, WAYS, Case, LanguageModel, Network, Way
from reversible_adapters import Trunk, memcnn, ours, plain, revlib
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from training_step import columns_net

import revnets


class ColumnsClassifier(Network):
    """RevCol-T-shaped columns; the blocks are the functions of the cells.

    Args:
        depth: Number of columns.
        width: Unused, since the shape defines it.
        size: Side of the images.
        count: Images per batch.
    """

    rewires = False

    def __init__(self, depth: int, width: int, size: int, count: int):
        super().__init__()
        self.model = columns_net("T", depth)
        self.model.columns.memory = "store"
        self.batch = torch.randn(count, 3, size, size)
        self.labels = torch.randint(1000, (count,))

    @property
    def blocks(self) -> list[nn.Module]:
        return [cell.function for cell in revnets.find_columns(self).flat()]

    def replace_blocks(self, modules: list[nn.Module]) -> None:
        for cell, module in zip(revnets.find_columns(self).flat(), modules, strict=True):
            cell.function = module

    def set_memory(self, memory: str) -> None:
        revnets.find_columns(self).memory = memory

    def forward(self, images: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), self.labels)


class Branch(nn.Module):
    """The residual branch of a block: its output minus its input."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) - x


class TwoStreams(nn.Module):
    """The stack of blocks as a RevNet, which replaces all blocks and returns the mean of the streams.

    Keyword arguments of the blocks (masks, positions) are dropped, since GPT-2 without padding needs none.
    """

    def __init__(self, make: Callable[[nn.ModuleList], Trunk], blocks: list[nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(Branch(block) for block in blocks)
        self.trunk = make(self.branches)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        one, other = self.trunk(x)
        return (one + other) / 2


class Momentum(nn.Module):
    """The stack of blocks as a Momentum ResNet (Sander et al., 2021): v = 0.9 v + 0.1 (G(x) - x), x = x + v."""

    def __init__(self, use_backprop: bool, blocks: list[nn.Module]):
        super().__init__()
        from momentumnet import MomentumNet

        self.net = MomentumNet(blocks, gamma=0.9, use_backprop=use_backprop, is_residual=False)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.net(x)


def whole(make: Callable[[list[nn.Module]], nn.Module]) -> Callable[[list[nn.Module]], Iterator[nn.Module]]:
    """Return a method that replaces all blocks by one module."""
    return lambda blocks: iter([make(blocks)])


LIBRARIES = {
    "RevNet, store": Way(whole(partial(TwoStreams, plain)), function="RevNet"),
    "RevNet, exact": Way(whole(partial(TwoStreams, ours("exact"))), function="RevNet"),
    "RevNet, memcnn": Way(whole(partial(TwoStreams, memcnn)), function="RevNet"),
    "RevNet, revlib": Way(whole(partial(TwoStreams, revlib("autograd_function"))), function="RevNet"),
    "momentumnet, store": Way(whole(partial(Momentum, True)), function="momentum"),
    "momentumnet": Way(whole(partial(Momentum, False)), function="momentum"),
}


def installed(name: str) -> bool:
    """Return True if the package in the name of a method of `LIBRARIES` is installed."""
    words = name.replace(",", "").split()
    return all(importlib.util.find_spec(word) for word in words if word in ("memcnn", "revlib", "momentumnet"))


class Field(NamedTuple):
    """A network and the methods to train it."""

    case: Case
    ways: dict[str, Way]


PAIRS = "checkpoint pairs of blocks"


def fields() -> dict[str, Field]:
    """Return the networks by name. Cells of columns are not a chain and have no pairs; they are already reversible."""
    chained = (PAIRS, f"exact, budget: {PAIRS}", REWIRED)
    return {
        "columns": Field(
            Case(ColumnsClassifier, 8, 64, 128, 8, "RevCol-T", "columns"),
            {name: way for name, way in WAYS.items() if name not in chained},
        ),
        "gpt24": Field(
            Case(LanguageModel, 24, 128, 256, 12, "GPT-2"),
            {**WAYS, **{name: way for name, way in LIBRARIES.items() if installed(name)}},
        ),
    }


class Forecast(NamedTuple):
    """A predicted peak and the measured one, weights included."""

    planner: str
    way: str
    predicted: int
    measured: int

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def forecasts(field: Field, results: dict[str, finetuning.Result]) -> list[Forecast]:
    """Return the peaks of a step without optimizer, predicted by each planner that supports the method."""
    network = field.case.build()
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    baseline = REWIRED if network.rewires else finetuning.STORE
    found = []
    measured = {way: results[way].peak + weights for way in (finetuning.STORE, baseline, "exact")}
    if importlib.util.find_spec("kitsune") is not None:
        from kitsune.predict import predict_memory

        count, *shape = network.batch.shape
        result = predict_memory(network, tuple(shape), batch_size=count, optimizer="none")
        found += [
            Forecast("torch-kitsune", finetuning.STORE, result.total_bytes, measured[finetuning.STORE]),
            Forecast(
                "torch-kitsune, without its 15 % of overhead",
                finetuning.STORE,
                result.total_bytes - result.overhead_bytes,
                measured[finetuning.STORE],
            ),
        ]
    network.set_memory("store")
    plan = revnets.plan(network, network.batch, optimizer="none", modes=("store", "exact"))
    ways = (baseline, "exact")
    return found + [
        Forecast("revnets.plan", way, one.peak, measured[way]) for way, one in zip(ways, plan.modes, strict=True)
    ]


def main(
    case: Annotated[str, typer.Option(help="Comma-separated networks, of columns and gpt24.")] = "columns,gpt24",
    depth: Annotated[int | None, typer.Option(help="Number of columns or blocks, instead of 8 and 24.", min=2)] = None,
    batch: Annotated[int | None, typer.Option(help="Images or texts per step.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each method.", min=1)] = 4,
    png: Annotated[Path | None, typer.Option(help="Plot time against peak to this file.", callback=picture)] = None,
    markdown: Annotated[bool, typer.Option(help="Print the tables as Markdown.")] = False,
) -> None:
    """Compare methods to train in less memory, and memory planners."""
    torch.set_num_threads(1)
    console = Console()
    chosen: list[Field] = listed(case, "--case", fields(), " or ".join(fields()))
    changed = {key: value for key, value in (("depth", depth), ("count", batch)) if value is not None}
    results: dict[str, dict[str, finetuning.Result]] = {}
    predictions: dict[str, list[Forecast]] = {}
    # All blocks share one code object, under several budgets. None may silently fall back to eager.
    compiler = dynamo_config.patch(
        recompile_limit=999, accumulated_recompile_limit=9999, automatic_dynamic_shapes=False
    )
    with Progress(console=console, transient=True) as progress, compiler:
        for field in (one._replace(case=one.case._replace(**changed)) for one in chosen):
            title = field.case.title
            steps = len(field.ways) + rounds * sum(way.is_timed for way in field.ways.values())
            task = progress.add_task(field.case.words, total=steps)
            tick = partial(progress.advance, task)
            results[title] = finetuning.measure(field.case, rounds, tick, field.ways)
            predictions[title] = forecasts(field, results[title])
            if markdown:
                lines = finetuning.as_markdown(title, results[title])
                console.print(lines, markup=False, highlight=False, soft_wrap=True)
            else:
                console.print(finetuning.table(title, results[title]))
    rows = [
        (
            title.split(":")[0],
            one.planner,
            one.way,
            f"{one.predicted / 1e6:.1f}",
            f"{one.measured / 1e6:.1f}",
            f"{one.error:+.1%}",
        )
        for title, found in predictions.items()
        for one in found
    ]
    _print_forecasts(console, rows, markdown)
    console.print(f"torch {torch.__version__}, 1 thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if png is not None:
        finetuning.draw(results, png)
        console.print(f"wrote {png}", highlight=False, markup=False, soft_wrap=True)


def _print_forecasts(console: Console, rows: list[tuple[str, ...]], markdown: bool) -> None:
    names = ("network", "planner", "way", "predicted MB", "measured MB", "error")
    if markdown:
        lines = [f"| {' | '.join(names)} |", "| --- | --- | --- | ---: | ---: | ---: |"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        console.print("\n".join(["**Predicted peaks**", "", *lines, ""]), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(title="Predicted peaks", title_justify="left")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < 3 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
