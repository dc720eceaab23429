"""Bytes, seconds and tables as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def table_of(title: str, headings: Sequence[str], left: int) -> Table:
    """A table that fits a terminal of 80 columns; the first `left` columns are aligned at the left."""
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
    """Bytes as a person reads them: `1.43 MiB`; NaN, where nothing could be measured, is `-`."""
    if math.isnan(count):
        return "-"
    power = min(4, int(math.log(max(1, abs(count)), 1024)))
    count /= 1024**power
    digits = 0 if power == 0 or count >= 100 else 1 if count >= 10 else 2
    return f"{count:.{digits}f} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """Time as a person reads it: `1.43 s`, `870 ms`; NaN, where nothing could be measured, is `-`."""
    if math.isnan(seconds):
        return "-"
    number, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{number:.{max(0, 2 - max(0, math.floor(math.log10(max(number, 1)))))}f} {unit}"


def thinned(items: Sequence[T], most: int) -> list[T | None]:
    """All items, or the first and last `most // 2` of them with None between."""
    return list(items) if len(items) <= most else [*items[: most // 2], None, *items[-(most // 2) :]]
