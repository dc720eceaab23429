"""Output of analyses: progress, tables, figures, and CSV files."""

from __future__ import annotations

import csv as csv_format
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

import typer
from rich.console import Console
from rich.progress import Progress, track

from revnets.cli.options import check_place, picture_path
from revnets.config.errors import SpecError, option_error
from revnets.utils.atomic_files import replacing
from revnets.utils.format import table_of

T = TypeVar("T")

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Png = Annotated[
    Path, typer.Option(help="Write the figure to this .png, .svg or .pdf file.", callback=picture_path, readable=False)
]
Csv = Annotated[
    Path | None,
    typer.Option(
        help="Write the numbers to this file. By default it has the name of the figure and the suffix .csv.",
        show_default=False,
        readable=False,
    ),
]


def outputs(png: Path, csv: Path | None) -> tuple[Path, Path]:
    """Return the paths of figure and CSV file, and check that both can be written.

    Args:
        png: Path of the figure.
        csv: Path of the CSV file, or None for that of the figure with the suffix .csv.

    Raises:
        revnets.SpecError: If a file cannot be written, or both paths are equal.
    """
    csv = csv or png.with_suffix(".csv")
    if csv == png:
        raise option_error("--csv", f"{csv} is the path of the figure", "Give another path", code="name-clash")
    check_place("--png", png)
    check_place("--csv", csv)
    return png, csv


def deliver(figure: Figure, png: Path, rows: Sequence[Mapping[str, Any]], csv: Path) -> str:
    """Write figure and CSV file, each completely or not at all.

    Returns:
        A message with both paths.

    Raises:
        revnets.SpecError: If a file cannot be written.
    """
    from revnets.plotting.style import save

    with reporting_unwritable(png):
        save(figure, png)
        save_csv(rows, csv)
    return f"wrote {png} and {csv}"


def save_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows to a CSV file. The header contains the keys of the first row, and floats have six digits."""
    with replacing(path, "w") as file:
        writer = csv_format.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows(
            [f"{value:.6g}" if isinstance(value, float) else value for value in row.values()] for row in rows
        )


def print_rows(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Print rows as a table with a title."""
    table = table_of("", list(rows[0]), left=0)
    for row in rows:
        table.add_row(*row.values())
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)


@contextmanager
def progress(console: Console, total: int | None) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """Show a progress bar on a terminal.

    Args:
        console: Console of the bar.
        total: Number of steps, or None if it is unknown.

    Yields:
        A function that sets the description, and a function that advances the bar by one step.
    """
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)


@contextmanager
def tracked(items: Iterable[T], description: str, console: Console | None = None) -> Iterator[Iterator[T]]:
    """Iterate over items with a progress bar on a terminal, which ends with the body even if the body raises.

    If the garbage collector ended the bar, it could wait for the drawing thread, which waits for the console.

    Args:
        items: Items to iterate over.
        description: Description of the bar.
        console: Console of the bar, or None for the default one.

    Yields:
        An iterator over the items.
    """
    disable = console is not None and not console.is_terminal
    bar = track(items, description, console=console, transient=True, disable=disable)
    with closing(cast("Generator[T]", bar)) as left:
        yield left


@contextmanager
def reporting_unwritable(path: Path) -> Iterator[None]:
    """Context manager that converts an `OSError` of writing `path` to a `SpecError`."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise SpecError(
            str(error.filename or path), "", problem, "Free some space, or give another path", code="unwritable-file"
        ) from error
