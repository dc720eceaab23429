"""Formatting of bytes, seconds and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def table_of(title: str, headings: Sequence[str], left: int) -> Table:
    """Return an empty table for a terminal of 80 columns.

    Args:
        title: Title of the table.
        headings: Headings of the columns.
        left: Number of columns that are left-aligned. The others are right-aligned.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", no_wrap=True)
    return table


def size(count: float) -> str:
    """Format a number of bytes, such as `1.43 MiB`. NaN (not measured) is `-`."""
    if math.isnan(count):
        return "-"
    power = min(4, int(math.log(max(1, abs(count)), 1024)))
    count /= 1024**power
    digits = 0 if power == 0 or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """Format a duration, such as `1.43 s` or `870 ms`. NaN (not measured) is `-`."""
    if math.isnan(seconds):
        return "-"
    number, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{number:.{max(0, 2 - max(0, math.floor(math.log10(max(number, 1)))))}f} {unit}"


def thinned(items: Sequence[T], most: int) -> list[T | None]:
    """Return all items if there are at most `most`, else the first and last `most // 2` with None in between."""
    return list(items) if len(items) <= most else [*items[: most // 2], None, *items[-(most // 2) :]]
