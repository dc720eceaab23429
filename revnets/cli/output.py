"""What an analysis shows of itself: progress, a table, a picture, and the numbers in it as CSV."""

from __future__ import annotations

import csv as csv_format
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from revnets.cli.main import picture_path
from revnets.config.errors import SpecError
from revnets.utils.atomic_files import check_place, replacing, told_if_unwritable
from revnets.utils.format import table_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Png = Annotated[Path, typer.Option(help="Draw into this file: .png, .svg or .pdf.", callback=picture_path)]
Csv = Annotated[
    Path | None, typer.Option(help="Where the numbers go; beside the picture by default.", show_default=False)
]


def outputs(png: Path, csv: Path | None) -> tuple[Path, Path]:
    """The two files, looked at before any work is done. The numbers lie beside the picture unless told otherwise.

    Raises:
        revnets.SpecError: a file could not be written there, or both have one name.
    """
    csv = csv or png.with_suffix(".csv")
    if csv == png:
        raise SpecError("command line", "--csv", f"{csv} is the picture already", "Give it another name")
    check_place("--png", png)
    check_place("--csv", csv)
    return png, csv


def deliver(figure: Figure, png: Path, rows: Sequence[Mapping[str, Any]], csv: Path) -> str:
    """Write both files, each complete or not at all; returns a line that says so.

    Raises:
        revnets.SpecError: one of them cannot be written.
    """
    from revnets.plotting.audit import save

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
    console.print(title, style="bold", highlight=False, soft_wrap=True)
    console.print(table)


@contextmanager
def progress(console: Console, total: int | None) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """A bar on a terminal; yields what says what is being done, and what says that one of `total` steps is done."""
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda text: bar.update(task, description=text), lambda: bar.advance(task)
