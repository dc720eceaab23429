"""Commands of other packages, found by entry points."""

from __future__ import annotations


def missing_command(name: str, module: str, error: ImportError):
    """What stands in for a command whose package cannot be imported: it says what to install."""

    def command() -> None:
        extra = module.removeprefix("revnets.cli.").partition(".")[0]
        raise SystemExit(f"revnets {name}: cannot import {module} ({error}). Try: pip install 'revnets[{extra}]'")

    command.__doc__ = f"Not available here: {error}."
    return command
