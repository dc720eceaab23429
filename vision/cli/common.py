"""Options and errors that the commands of this package share."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from revnets.cli.plugins import one_line_errors

Overrides = Annotated[
    list[str] | None, typer.Argument(help="key.path=value, e.g. epochs=5 model.columns=8", show_default=False)
]


def _errors() -> tuple[type[Exception], ...]:
    from vision.errors import EXPECTED

    return EXPECTED


reported = partial(one_line_errors, _errors)
