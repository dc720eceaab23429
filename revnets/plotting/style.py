"""What all figures share: saving, colors and number formats."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from revnets.engine.errors import ArgumentError
from revnets.utils.atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf")

INK = "#222222"

MODE_COLOURS = {"store": "#767676", "recompute": "#56B4E9", "invert": "#D55E00", "exact": "#009E73"}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the suffix names. The file appears complete or not at all.

    Raises:
        ArgumentError: the suffix is none of .png, .svg and .pdf.
    """
    import matplotlib

    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        text = f"{path}: a picture is saved as .{', .'.join(FORMATS)}; give the file one of these suffixes"
        raise ArgumentError(text, "path", code="unknown-suffix")
    # No dates and no random ids: the same figure gives the same file. Whole fonts in PDF, as publishers ask for.
    date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with replacing(path) as file, matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "revnets"}):
        figure.savefig(file, format=kind, dpi=200, metadata=date)


def whole_numbers(axes: Axes) -> None:
    """Let the ticks of an x-axis be whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def unit_of(largest: int) -> tuple[int, str]:
    """Bytes of the unit in which an axis up to this number is read best, and its name."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if largest >= unit:
            return unit, name
    return 1, "bytes"
