"""Options and statistics shared by several benchmarks. Invalid options are reported before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from revnets.plotting.style import FORMATS


def listed(text: str, option: str, allowed: Mapping[str, Any], words: str) -> list[Any]:
    """Map comma-separated names to their values.

    Args:
        text: The names.
        option: The option, for the error.
        allowed: Value of each allowed name.
        words: Description of the allowed names, for the error.

    Raises:
        typer.BadParameter: If a name is not allowed.
    """
    for word in text.split(","):
        if word.strip() not in allowed:
            raise typer.BadParameter(f"{word.strip()!r}: use {words}, separated by commas", param_hint=option)
    return [allowed[word.strip()] for word in text.split(",")]


def counts(text: str, option: str, least: int, step: int = 1) -> list[int]:
    """Parse comma-separated numbers from `least` to 1024, in steps of `step`."""
    allowed = {str(number): number for number in range(least, 1025, step)}
    kind = "even numbers" if step == 2 else "numbers"
    return listed(text, option, allowed, f"{kind} from {least} to 1024")


def picture(path: Path | None) -> Path | None:
    """Check the suffix of a figure file; for `typer.Option(callback=...)`."""
    if path is not None and path.suffix.lower().removeprefix(".") not in FORMATS:
        raise typer.BadParameter(f"{path}: use a file name that ends in .{', .'.join(FORMATS)}")
    return path


def ratios_by_round(seconds: Sequence[float], base: Sequence[float]) -> list[float]:
    """Return the sorted ratios of times measured in the same rounds."""
    return sorted(mine / other for mine, other in zip(seconds, base, strict=True))
