"""Common parts of all figures: saving, colors and number formats."""

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

MODE_COLORS = {"store": "#767676", "recompute": "#56B4E9", "invert": "#D55E00", "exact": "#009E73"}


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Save a figure in the format of the suffix. The file is written completely or not at all.

    Args:
        figure: Figure of matplotlib.
        path: Path that ends in .png, .svg or .pdf.

    Raises:
        ArgumentError: If the suffix is not one of these.
    """
    import matplotlib

    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        text = f"{path}: the suffix of a figure must be one of .{', .'.join(FORMATS)}"
        raise ArgumentError(text, "path", code="unknown-suffix")
    # Without dates and random ids, the same figure produces the same file. Publishers require TrueType fonts in PDF.
    date = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with replacing(path) as file, matplotlib.rc_context({"pdf.fonttype": 42, "svg.hashsalt": "revnets"}):
        figure.savefig(file, format=kind, dpi=200, metadata=date)


def whole_numbers(axes: Axes) -> None:
    """Restrict the ticks of the x-axis to whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def unit_of(largest: int) -> tuple[int, str]:
    """Return the unit for an axis up to this number of bytes, as bytes and name."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if largest >= unit:
            return unit, name
    return 1, "bytes"
