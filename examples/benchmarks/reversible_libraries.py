"""Compare one training step of a RevNet (m = 2, gamma = 1) by this engine and by other libraries, on the same weights.

    .venv/bin/python -m pip install --no-deps memcnn revlib    # optional: missing packages are skipped
    .venv/bin/python examples/benchmarks/reversible_libraries.py    # 8, 16 and 32 blocks, MLP and convolutions
    .venv/bin/python examples/benchmarks/reversible_libraries.py --blocks 16 --case conv --png out/libraries.png

`reversible_adapters.py` defines the methods. Outputs are compared first. Prints CPU seconds (user and system, medians
of interleaved rounds, one thread), their ratio to plain autograd in the same round (median and range), bytes saved for
backward, peak bytes (gradients of the parameters included) and the gradient error against plain autograd, all from one
run.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from _cli import counts, listed, picture, ratios_by_round
from reversible_adapters import CASES, REFERENCE, WAYS, Case, Net, Trained, installed
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from revnets.analysis.gradient_distance import gradient_distance
from revnets.memory.tracker import MemoryTracker
from revnets.plotting.style import save


class Result(NamedTuple):
    """Time, memory and gradient error of one step."""

    seconds: list[float]  # one per round
    kept: int
    peak: int
    error: float


class Contender:
    """One method, applied to a network that all methods share."""

    def __init__(self, name: str, net: Net, patches: Tensor, labels: Tensor):
        self.name, self.net, self.patches, self.labels = name, net, patches, labels
        self.model = Trained(net, WAYS[name])
        self.seconds: list[float] = []

    def logits(self) -> Tensor:
        return self.model(self.patches)

    def loss(self) -> Tensor:
        return F.cross_entropy(self.logits(), self.labels)

    def gradients(self) -> dict[str, Tensor | None]:
        """Compute the gradients of all parameters with `backward`, since memcnn does not support `grad`."""
        self.net.zero_grad()
        self.loss().backward()
        gradients = {name: parameter.grad for name, parameter in self.net.named_parameters()}
        self.net.zero_grad()
        return gradients

    def timed(self) -> None:
        self.net.zero_grad()
        gc.collect()
        start = time.process_time()
        self.loss().backward()
        self.seconds.append(time.process_time() - start)

    def memory(self) -> tuple[int, int]:
        """Count the bytes saved for backward, and the peak bytes of a step, gradients included."""
        self.net.zero_grad()
        gc.collect()
        with MemoryTracker() as tracker:
            loss = self.loss()
            kept = tracker.live
            loss.backward()
        self.net.zero_grad()
        return kept, tracker.peak


def contenders(names: Sequence[str], case: Case, depth: int) -> list[Contender]:
    """Create all methods on one network and one batch. The first is the reference and must be plain autograd."""
    torch.manual_seed(0)
    net = Net(case.block, depth, case.shape[-1])
    patches, labels = torch.randn(*case.shape[:-1], net.stem.in_features), torch.randint(100, case.shape[:1])
    return [Contender(name, net, patches, labels) for name in names]


def measure(names: Sequence[str], case: Case, depth: int, rounds: int, tick: Callable[[], None]) -> dict[str, Result]:
    """Measure all methods.

    Raises:
        SystemExit: If two methods do not compute the same function.
    """
    field = contenders(names, case, depth)
    outputs = field[0].logits().detach()
    for contender in field[1:]:
        # Only the order of additions may differ.
        if not torch.allclose(contender.logits(), outputs, rtol=1e-4, atol=1e-5):
            raise SystemExit(f"{contender.name} and {names[0]} compute different functions; the comparison is invalid")
    reference = field[0].gradients()
    errors = [gradient_distance(contender.gradients(), reference).relative for contender in field]
    memory = [contender.memory() for contender in field]
    for _ in range(rounds):
        for contender in field:
            contender.timed()
        tick()
    return {each.name: Result(each.seconds, *memory[i], errors[i]) for i, each in enumerate(field)}


def main(
    case: Annotated[str, typer.Option(help=f"Comma-separated kinds of block, of {', '.join(CASES)}.")] = ",".join(
        CASES
    ),
    blocks: Annotated[
        str, typer.Option(help="Comma-separated even numbers of blocks; memcnn couples pairs.")
    ] = "8,16,32",
    rounds: Annotated[int, typer.Option(help="Timed steps of each method.", min=1)] = 7,
    png: Annotated[
        Path | None, typer.Option(help="Plot time against peak to this file (.png, .svg, .pdf).", callback=picture)
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the tables as Markdown.")] = False,
) -> None:
    """Compare this engine with plain autograd, checkpointing, memcnn and revlib on one training step."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # memcnn, in every backward
    warnings.filterwarnings("ignore", r"`torch.cuda.amp", FutureWarning)  # revlib graph
    kinds = listed(case, "--case", {kind: kind for kind in CASES}, " or ".join(CASES))
    depths = counts(blocks, "--blocks", 2, step=2)
    console = Console()
    names, missing = installed()
    for package in missing:
        console.print(
            f"{package} is not installed and is skipped. Install it: python -m pip install --no-deps {package}"
        )
    results: dict[tuple[str, int], dict[str, Result]] = {}
    with Progress(console=console, transient=True) as progress:
        for kind in kinds:
            for depth in depths:
                task = progress.add_task(f"{kind}, {depth} blocks", total=rounds)
                result = measure(names, CASES[kind], depth, rounds, lambda task=task: progress.advance(task))
                progress.remove_task(task)
                title = f"{depth} blocks of {CASES[kind].words}, states of {CASES[kind].shape}"
                if markdown:
                    console.print(as_markdown(title, result), markup=False, highlight=False, soft_wrap=True)
                else:
                    console.print(table(title, result))
                results[kind, depth] = result
    console.print(f"torch {torch.__version__}, 1 thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if png is not None:
        draw(results, png)
        console.print(f"wrote {png}", highlight=False, markup=False, soft_wrap=True)


COLUMNS = ("", "CPU s", "x plain", "range", "kept MB", "peak MB", "gradient error")


def row(name: str, result: Result, base: Result) -> tuple[str, ...]:
    verdict = "bit for bit" if result.error == 0 else f"{result.error:.1e}"
    ratios = ratios_by_round(result.seconds, base.seconds)
    return (
        name,
        f"{statistics.median(result.seconds):.2f}",
        f"{statistics.median(ratios):.2f}",
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
        f"{result.kept / 1e6:.1f}",
        f"{result.peak / 1e6:.1f}",
        verdict,
    )


def table(title: str, results: dict[str, Result]) -> Table:
    rows = Table(title=title, title_justify="left")
    for name in COLUMNS:
        rows.add_column(name, justify="right" if name else "left")
    for name, result in results.items():
        *cells, verdict = row(name, result, results[REFERENCE])
        color = "green" if result.error == 0 else "yellow" if result.error < 0.01 else "red"
        rows.add_row(*cells, f"[{color}]{verdict}")
    return rows


def as_markdown(title: str, results: dict[str, Result]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]
    lines += [f"| {' | '.join(row(name, result, results[REFERENCE]))} |" for name, result in results.items()]
    return "\n".join([*lines, ""])


# Okabe and Ito's colors with different markers, so that color alone never distinguishes two methods. Filled: gradients
# equal those of plain autograd bit for bit.
STYLES = {
    "plain autograd": ("#000000", "s"),
    "torch checkpoint": ("#e69f00", "D"),
    "memcnn": ("#cc79a7", "^"),
    "revlib": ("#d55e00", "v"),
    "revlib graph": ("#d55e00", "<"),
    "revnets store": ("#56b4e9", "s"),
    "revnets recompute": ("#56b4e9", "P"),
    "revnets invert": ("#0072b2", "X"),
    "revnets exact": ("#0072b2", "o"),
    "revnets exact, planned": ("#009e73", "*"),
}


def draw(results: dict[tuple[str, int], dict[str, Result]], path: Path) -> None:
    """Plot time against peak; closer to the lower left corner is better."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    kinds = list(dict.fromkeys(kind for kind, _ in results))
    depths = list(dict.fromkeys(depth for _, depth in results))
    figure = Figure(figsize=(1.6 + 3.2 * len(depths), 1.2 + 2.8 * len(kinds)), layout="constrained")
    axes = figure.subplots(len(kinds), len(depths), squeeze=False, sharey="row")
    for (kind, depth), result in results.items():
        axis = axes[kinds.index(kind)][depths.index(depth)]
        for name, one in result.items():
            color, marker = STYLES[name]
            axis.plot(
                one.peak / 1e6,
                statistics.median(ratios_by_round(one.seconds, result[REFERENCE].seconds)),
                linestyle="none",
                marker=marker,
                markersize=9,
                markeredgewidth=1.6,
                color=color,
                fillstyle="full" if one.error == 0 else "none",
                label=name,
            )
        axis.set(xscale="log", title=f"{kind}, {depth} blocks")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
        axis.margins(0.12)
    for line in axes:
        line[0].set_ylabel("CPU time, x plain autograd")
    for axis in axes[-1]:
        axis.set_xlabel("peak MB")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=2 + len(depths),
        frameon=False,
        title="filled: gradients equal those of plain autograd bit for bit; hollow: they differ",
    )
    save(figure, path)


if __name__ == "__main__":
    typer.run(main)
