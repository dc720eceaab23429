"""Mistakes that a user can mend, told in one line on stderr, for commands of every package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

Errors = tuple[type[Exception], ...]


@contextmanager
def one_line_errors(expected: Callable[[], Errors], extra: str | None = None) -> Iterator[None]:
    """End a command with exit code 1 and one line if its body raises what was expected, or an `OSError`.

    `SpecError` and `PlanError` pass: the command `revnets` itself tells them.

    Args:
        expected: gives the types of errors whose message is all that a user needs. It is called when something went
            wrong, so that their modules are not imported before.
        extra: of the distribution; a module that is not installed is said to come with it. Without it, what cannot be
            imported is a bug and shows its traceback.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and extra is not None:
            text = f"{error.name} is not installed. Try: pip install 'revnets[{extra}]'"
        elif isinstance(error, OSError) and error.filename and error.strerror:
            text = f"{error.filename}: {error.strerror}. Check the path, its permissions and the free space"
        elif isinstance(error, (OSError, *expected())):
            text = str(error)
        else:
            raise
        typer.secho(f"error: {text}", fg="red", err=True)
        raise typer.Exit(1) from error
