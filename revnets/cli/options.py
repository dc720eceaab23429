"""Arguments and options of several commands."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from revnets.config.errors import option_error

_MODEL = (
    "YAML file of a network (docs/reference/yaml.md), name of a timm model (revcol_tiny), hf:FOLDER of a transformers "
    "model, or package.module:function."
)


SpecArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]


Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, e.g. columns=8 levels.2.depth=6", show_default=False)
]


Trust = Annotated[
    bool,
    typer.Option(
        "--trust/--no-trust",
        help="Import and run classes of other projects that the configuration names, such as custom blocks.",
    ),
]


Reversible = Annotated[
    float | None,
    typer.Option(
        metavar="BLEND",
        help="Make an ordinary residual network such as timm's vit_base_patch16_224 reversible with this blend, "
        "e.g. 0.1 (see revnets.make_reversible).",
        show_default=False,
    ),
]


InputShape = Annotated[
    str | None,
    typer.Option("--input", help="Shape of one sample, e.g. 3,224,224 (images), 197,768 (tokens) or 64 (vectors)."),
]


def sample_shape(text: str | None) -> tuple[int, ...] | None:
    """Parse the value of `--input`: sizes separated by commas or x.

    Raises:
        typer.BadParameter: If it is not a shape.
    """
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        problem = f"{text!r} is not a shape; give positive whole numbers such as 3,224,224"
        raise typer.BadParameter(problem, param_hint="--input")
    return shape


def check_place(option: str, path: Path) -> None:
    """Check that a command can write a file, before it computes anything.

    Args:
        option: Option with the path, for errors.
        path: The file to write.

    Raises:
        revnets.SpecError: If the file cannot be written.
    """
    if path.is_dir():
        raise option_error(option, f"{path} is a directory", "Give the name of a file", code="not-a-file")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise option_error(option, f"{folder} is not a writable directory", "Give another path", code="unwritable-file")


def picture_path(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Check the suffix of a figure and that it can be written, before the command computes anything.

    Raises:
        typer.BadParameter: If the suffix is not that of a figure.
        revnets.SpecError: If the file cannot be written.
    """
    from revnets.plotting.style import FORMATS

    if path is not None:
        if path.suffix.lower().removeprefix(".") not in FORMATS:
            known = ", .".join(FORMATS)
            raise typer.BadParameter(f"{path}: the suffix of a figure must be one of .{known}")
        check_place(param.opts[0], path)
    return path
