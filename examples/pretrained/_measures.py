"""Shared by the scripts on pretrained networks: memory of a step, spread over seeds, and the bundled verses."""

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
    """Memory of a training step, without parameters and optimizer."""

    kept: int  # bytes saved for backward
    peak: int  # highest number of bytes alive at once, gradients of the weights included


def read_verses() -> list[Verse]:
    """Read the bundled corpus in the order of the Bible (examples/data/README.md)."""
    with gzip.open(CORPUS, "rt", encoding="utf-8") as file:
        return [Verse(*line.rstrip("\n").split("\t")[1:]) for line in file]


def step_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> StepBytes:
    """Count the bytes that one forward and backward allocate."""
    with MemoryTracker() as tracker:
        value = loss()
        kept = tracker.live
        torch.autograd.grad(value, [weight for weight in model.parameters() if weight.requires_grad])
    return StepBytes(kept, tracker.peak)


def gradients(model: nn.Module, loss: Callable[[], Tensor], seed: int = 0) -> list[Tensor]:
    """Compute the gradients of all trained weights, with random numbers from the seed."""
    torch.manual_seed(seed)
    return list(torch.autograd.grad(loss(), [weight for weight in model.parameters() if weight.requires_grad]))


def all_equal(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return True if all tensors are equal bit for bit."""
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def spread(values: Sequence[float], digits: int) -> str:
    """Format mean ± standard deviation of a sample, or a single value."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def megabytes(number: int) -> str:
    return f"{number / 1e6:.2f} MB"


def new_table(title: str, *headings: str) -> Table:
    """Return an empty table with the first column aligned left and all others right."""
    table = Table(title=title, title_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left")
    return table


def memory_table(title: str, rows: Iterable[tuple[str, StepBytes]]) -> Table:
    """Return a table of the memory of a training step, one row per method."""
    table = new_table(title, "", "saved for backward", "peak")
    for name, used in rows:
        table.add_row(name, megabytes(used.kept), megabytes(used.peak))
    return table


def picture(path: Path | None) -> Path | None:
    """Check the suffix of a figure file; for `typer.Option(callback=...)`."""
    if path is not None and path.suffix.lower().removeprefix(".") not in FORMATS:
        raise typer.BadParameter(f"{path}: use a file name that ends in .{', .'.join(FORMATS)}")
    return path


def run_as_script(main: Callable[..., None]) -> None:
    """Run the command line of a script and report errors on one line."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def steps(values: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """Iterate over values, with a progress bar if the output is a terminal."""
    return track(values, description, total, transient=True, disable=not sys.stdout.isatty())


def new_console() -> Console:
    """Set one thread and a fixed seed, and return the console of a script."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return Console(highlight=False, soft_wrap=True)
