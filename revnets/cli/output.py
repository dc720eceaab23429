"""What an analysis shows of itself: progress, a table, a picture, and the numbers in it as CSV."""

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
    Path, typer.Option(help="Draw into this file: .png, .svg or .pdf.", callback=picture_path, readable=False)
]
Csv = Annotated[
    Path | None,
    typer.Option(help="Where the numbers go; beside the picture by default.", show_default=False, readable=False),
]


def outputs(png: Path, csv: Path | None) -> tuple[Path, Path]:
    """The two files, looked at before any work is done. The numbers lie beside the picture unless told otherwise.

    Raises:
        revnets.SpecError: a file could not be written there, or both have one name.
    """
    csv = csv or png.with_suffix(".csv")
    if csv == png:
        raise option_error("--csv", f"{csv} is the picture already", "Give it another name", code="name-clash")
    check_place("--png", png)
    check_place("--csv", csv)
    return png, csv


def deliver(figure: Figure, png: Path, rows: Sequence[Mapping[str, Any]], csv: Path) -> str:
    """Write both files, each complete or not at all; returns a line that says so.

    Raises:
        revnets.SpecError: one of them cannot be written.
    """
    from revnets.plotting.style import save

    with told_if_unwritable(png):
        save(figure, png)
        save_csv(rows, csv)
    return f"wrote {png} and {csv}"


def save_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line for each row under a line of names, those of the first row; decimal numbers with six digits."""
    with replacing(path, "w") as file:
        writer = csv_format.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows(
            [f"{value:.6g}" if isinstance(value, float) else value for value in row.values()] for row in rows
        )


def print_rows(console: Console, title: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Numbers, one row below the other, under a title."""
    table = table_of("", list(rows[0]), left=0)
    for row in rows:
        table.add_row(*row.values())
    console.print(title, style="bold", highlight=False, markup=False, soft_wrap=True)
    console.print(table)


@contextmanager
def progress(console: Console, total: int | None) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar on a terminal; yields what says what is being done, and what says that one of `total` steps is done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)


@contextmanager
def tracked(items: Iterable[T], description: str, console: Console | None = None) -> Iterator[Iterator[T]]:
    """The items, with a bar on a terminal that ends with the body, also if that raises.

    A bar that the garbage collector ends may wait for the thread that draws it, which waits for the console.
    """
    disable = console is not None and not console.is_terminal
    bar = track(items, description, console=console, transient=True, disable=disable)
    with closing(cast("Generator[T]", bar)) as left:
        yield left


@contextmanager
def told_if_unwritable(path: Path) -> Iterator[None]:
    """Turn what the system says against a file, such as `path`, into a `SpecError`."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise SpecError(
            str(error.filename or path), "", problem, "Free some space, or give another name", code="unwritable-file"
        ) from error
