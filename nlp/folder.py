"""Where this package lies, for fairseq's --user-dir."""

from __future__ import annotations

from pathlib import Path

import typer

FOLDER = Path(__file__).resolve().parent


def user_dir() -> None:
    """Print the folder to give to fairseq: --user-dir "$(revnets user-dir)"."""
    typer.echo(FOLDER)
