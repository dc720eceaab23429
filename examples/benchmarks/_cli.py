"""Options that several benchmarks have. Mistakes are told before the work begins."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from revnets.plotting.style import FORMATS


def listed(text: str, option: str, allowed: Mapping[str, Any], words: str) -> list[Any]:
    """What the words of a list between commas stand for.

    Raises:
        typer.BadParameter: a word is not allowed; `words` says what is.
    """
    for word in text.split(","):
        if word.strip() not in allowed:
            raise typer.BadParameter(f"{word.strip()!r}: give {words}, separated by commas", param_hint=option)
    return [allowed[word.strip()] for word in text.split(",")]


def counts(text: str, option: str, least: int, step: int = 1) -> list[int]:
    """Numbers up to 1024, between commas."""
    allowed = {str(number): number for number in range(least, 1025, step)}
    kind = "even numbers" if step == 2 else "numbers"
    return listed(text, option, allowed, f"{kind} from {least} to 1024")


def picture(path: Path | None) -> Path | None:
    """For `typer.Option(callback=...)`: the path, if pictures of its ending can be drawn."""
    if path is not None and path.suffix.lower().removeprefix(".") not in FORMATS:
        raise typer.BadParameter(f"{path}: give a file name that ends in .{', .'.join(FORMATS)}")
    return path
