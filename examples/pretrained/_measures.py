"""What the scripts about trained networks share: bytes of a step, spreads over seeds, and the bundled verses."""

from __future__ import annotations

import gzip
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from revnets.memory.tracker import MemoryTracker
from revnets.plotting.style import FORMATS

T = TypeVar("T")

CORPUS = Path(__file__).resolve().parents[1] / "data" / "kjv-elberfelder-short.en-de.tsv.gz"


class Verse(NamedTuple):
    """A sentence of the King James Version and of the Elberfelder Bible."""

    english: str
    german: str


class StepBytes(NamedTuple):
    """What a training step allocates, without parameters and optimizer."""

    kept: int  # alive between forward and backward
    peak: int  # most at once, gradients of the weights among them


def read_verses() -> list[Verse]:
    """The bundled corpus in the order of the Bible (examples/data/README.md)."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as file:
        return [Verse(*line.rstrip("\n").split("\t")[1:]) for line in file]


def step_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> StepBytes:
    """Bytes that one forward and backward allocate, to the byte."""
    with MemoryTracker() as tracker:
        value = loss()
        kept = tracker.live
        torch.autograd.grad(value, [weight for weight in model.parameters() if weight.requires_grad])
    return StepBytes(kept, tracker.peak)


def gradients(model: nn.Module, loss: Callable[[], Tensor], seed: int = 0) -> list[Tensor]:
    """Gradients of all trained weights, with the random numbers of the seed."""
    torch.manual_seed(seed)
    return list(torch.autograd.grad(loss(), [weight for weight in model.parameters() if weight.requires_grad]))


def all_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Are all tensors equal bit for bit?"""
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation of a sample; a single value as it is."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def megabytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB"


def new_table(title: str, *headings: str) -> Table:
    """A table whose first column is aligned to the left and all others to the right."""
    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table


def memory_table(title: str, rows: Iterable[tuple[str, StepBytes]]) -> Table:
    """Bytes of a training step, one row for each way to train."""
    table = new_table(title, "", "kept for backward", "peak")
    for name, used in rows:
        table.add_row(name, megabytes(used.kept), megabytes(used.peak))
    return table


def picture(path: Path | None) -> Path | None:
    """For `typer.Option(callback=...)`: the path, if pictures of its ending can be drawn."""
    if path is not None and path.suffix.lower().removeprefix(".") not in FORMATS:
        raise typer.BadParameter(f"{path}: give a file name that ends in .{', .'.join(FORMATS)}")
    return path


def run_as_script(main: Callable[..., None]) -> None:
    """The command line of a script; a mistake ends it with one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def steps(values: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """The values, with a progress bar if the output is a terminal."""
    return track(values, description, total, transient=True, disable=not sys.stdout.isatty())


def new_console() -> Console:
    """The console of a script, which computes on one thread and draws the same numbers in every run."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Console(highlight=False, soft_wrap=True)
