"""Compare one fine-tuning step of a transformer with reversible blocks and with the memory savers of PyTorch.

    .venv/bin/python -m pip install -e '.[hf]'                  # transformers, for GPT-2
    .venv/bin/python examples/benchmarks/finetuning.py          # both networks, 12 blocks
    .venv/bin/python examples/benchmarks/finetuning.py --case vit --batch 32 --rounds 3 --png out/finetuning.png

`finetuning_ways.py` defines the networks and the methods. Prints CPU seconds (user and system, medians and ranges of
interleaved rounds, one thread), bytes saved for backward, peak bytes (gradients of the parameters included) and the
gradient error against plain autograd on the same function, all from one run. The bytes of `save_on_cpu` are those of a
simulated device. Its time is omitted, because a CPU has no link to copy over.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from _cli import listed, picture, ratios_by_round
from finetuning_ways import CASES, REWIRED, STORE, WAYS, Case, Way
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import revnets
from revnets.analysis.gradient_distance import gradient_distance
from revnets.memory.tracker import MemoryTracker
from revnets.plotting.style import save


class Result(NamedTuple):
    """Time, memory and gradient error of one step."""

    seconds: list[float]  # one per round; empty if the time is not meaningful
    kept: int
    peak: int
    error: float


class CompiledTracker(MemoryTracker):
    """Also count the operators of compiled blocks, which this backend runs one by one."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class Contender:
    """A separate network that is trained by one method."""

    def __init__(self, way: Way, case: Case):
        self.way = way
        self.network = case.build()
        self.weights = dict(enumerate(self.network.parameters()))  # by number, since some methods change the names
        way.apply(self.network)
        self.seconds: list[float] = []

    def loss(self) -> Tensor:
        with self.way.hooks(self.network):
            return self.network(self.network.batch)

    def gradients(self) -> dict[str, Tensor | None]:
        self.network.zero_grad()
        self.loss().backward()
        gradients = {str(number): weight.grad for number, weight in self.weights.items()}
        self.network.zero_grad()
        return gradients

    def timed(self) -> None:
        self.network.zero_grad()
        start = time.process_time()
        self.loss().backward()
        self.seconds.append(time.process_time() - start)
        self.network.zero_grad()

    def memory(self) -> tuple[int, int]:
        """Count the bytes saved for backward, and the peak bytes of a step, gradients included."""
        self.network.zero_grad()
        with CompiledTracker() as tracker:
            loss = self.loss()
            kept = tracker.live
            loss.backward()
        self.network.zero_grad()
        return kept, tracker.peak

    def plan(self, peaks: Mapping[str, int]) -> bool:
        """Store cells as far as the budget allows, if there is one. Return False if even `exact` does not fit."""
        network, limit = self.network, self.way.budget
        if limit is None:
            return True
        if limit != self.way.memory:  # a budget includes the weights
            limit = peaks[limit] + sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
        try:
            revnets.plan(network, network.batch, optimizer="none", modes=(), budget=limit).apply(network)
        except revnets.PlanError:
            return False
        return True


def measure(
    case: Case, rounds: int, tick: Callable[[], None], ways: Mapping[str, Way] | None = None
) -> dict[str, Result]:
    """Measure all methods on one network.

    Args:
        ways: The methods; default: `WAYS`.
        rounds: Timed steps of each method. The order is reversed after every round.
        tick: Called after each step.

    Returns:
        The results by name, without methods whose budget is below the peak of `exact`.
    """
    field: dict[str, Contender] = {}
    found: dict[str, tuple[int, int, float]] = {}
    references: dict[str, dict[str, Tensor | None]] = {}
    peaks: dict[str, int] = {}
    for name, way in (WAYS if ways is None else ways).items():
        contender = Contender(way, case)
        if not contender.plan(peaks):
            continue
        field[name] = contender
        gradients = contender.gradients()  # also compiles, if needed
        reference = references.setdefault(way.function_of(contender.network), gradients)
        kept, peaks[name] = contender.memory()
        found[name] = kept, peaks[name], gradient_distance(gradients, reference).relative
        tick()
    order = [contender for contender in field.values() if contender.way.is_timed]
    for _ in range(rounds):
        for contender in order:
            contender.timed()
            tick()
        order.reverse()
    return {name: Result(field[name].seconds, *numbers) for name, numbers in found.items()}


def main(
    case: Annotated[str, typer.Option(help=f"Comma-separated networks, of {', '.join(CASES)}.")] = ",".join(CASES),
    batch: Annotated[int | None, typer.Option(help="Images or texts per step.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Timed steps of each method.", min=1)] = 5,
    png: Annotated[Path | None, typer.Option(help="Plot time against peak to this file.", callback=picture)] = None,
    markdown: Annotated[bool, typer.Option(help="Print the tables as Markdown.")] = False,
) -> None:
    """Compare methods to fine-tune a network in less memory."""
    torch.set_num_threads(1)
    console = Console()
    chosen: list[Case] = listed(case, "--case", CASES, " or ".join(CASES))
    if batch is not None:
        chosen = [one._replace(count=batch) for one in chosen]
    results: dict[str, dict[str, Result]] = {}
    steps = len(WAYS) + rounds * sum(way.is_timed for way in WAYS.values())
    with Progress(console=console, transient=True) as progress:
        for one in chosen:
            task = progress.add_task(one.words, total=steps)
            results[one.title] = measure(one, rounds, lambda task=task: progress.advance(task))
            if markdown:
                lines = as_markdown(one.title, results[one.title])
                console.print(lines, markup=False, highlight=False, soft_wrap=True)
            else:
                console.print(table(one.title, results[one.title]))
    console.print(f"torch {torch.__version__}, 1 thread of {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if png is not None:
        draw(results, png)
        console.print(f"wrote {png}")


COLUMNS = ("", "CPU s", "range", "x store", "kept MB", "peak MB", "gradient error")


def relative_time(result: Result, base: Result) -> float:
    """Return the median ratio to the times of `base` in the same rounds."""
    return statistics.median(ratios_by_round(result.seconds, base.seconds))


def row(name: str, result: Result, base: Result) -> tuple[str, ...]:
    times = ("", "", "")
    if result.seconds:
        median, low, high = statistics.median(result.seconds), min(result.seconds), max(result.seconds)
        times = (f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{relative_time(result, base):.2f}")
    verdict = "bit for bit" if result.error == 0 else f"{result.error:.1e}"
    return name, *times, f"{result.kept / 1e6:.1f}", f"{result.peak / 1e6:.1f}", verdict


def table(title: str, results: dict[str, Result]) -> Table:
    rows = Table(title=title, title_justify="left")
    for name in COLUMNS:
        rows.add_column(name, justify="right" if name else "left")
    following = dict(pairwise(results))
    for name, result in results.items():
        *cells, verdict = row(name, result, results[STORE])
        color = "green" if result.error == 0 else "yellow" if result.error < 1e-5 else "red"
        rows.add_row(*cells, f"[{color}]{verdict}", end_section=following.get(name) == REWIRED)
    return rows


def as_markdown(title: str, results: dict[str, Result]) -> str:
    lines = [f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]
    lines += [f"| {' | '.join(row(name, result, results[STORE]))} |" for name, result in results.items()]
    return "\n".join([*lines, ""])


# Okabe and Ito's colors: one per kind of method. Markers distinguish methods of the same kind.
COLORS = {
    "checkpoint": "#e69f00",
    "compile": "#cc79a7",
    "int8": "#d55e00",
    "exact": "#0072b2",
    "RevNet": "#009e73",
    "momentumnet": "#56b4e9",
    "": "#000000",
}
MARKERS = "oD^vsP*X"


def styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return color and marker of each method, from the first word of its name."""
    seen: Counter[str] = Counter()
    found = {}
    for name in names:
        kind = next(kind for kind in COLORS if name.startswith(kind))
        found[name] = COLORS[kind], MARKERS[seen[kind]]
        seen[kind] += 1
    return found


def draw(results: dict[str, dict[str, Result]], path: Path) -> None:
    """Plot time against peak; closer to the lower left corner is better."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4 * len(results) + 3.4, 4.4), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    style = styles(dict.fromkeys(name for result in results.values() for name, one in result.items() if one.seconds))
    for axis, (title, result) in zip(axes, results.items(), strict=True):
        for name, one in result.items():
            if not one.seconds:
                continue
            color, marker = style[name]
            times = [seconds / base for seconds, base in zip(one.seconds, result[STORE].seconds, strict=True)]
            middle = statistics.median(times)
            axis.errorbar(
                one.peak / 1e6,
                middle,
                yerr=[[middle - min(times)], [max(times) - middle]],
                fmt=marker,
                color=color,
                elinewidth=0.8,
                fillstyle="full" if one.error == 0 else "none",
                label=name,
            )
        right = 1.05 * max(one.peak for one in result.values()) / 1e6
        axis.set(title=title, xlabel="peak MB", ylabel="CPU time, x store", xlim=(0, right))
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    found = [dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True)) for axis in axes]
    handles = {name: handle for legend in found[::-1] for name, handle in legend.items()}
    labels = [name for name in style if name in handles]
    note = "filled: gradients equal those of\nplain autograd bit for bit"
    figure.legend(
        [handles[name] for name in labels],
        labels,
        loc="outside right upper",
        frameon=False,
        fontsize=8,
        title=note,
        title_fontsize=8,
    )
    save(figure, path)


if __name__ == "__main__":
    typer.run(main)
