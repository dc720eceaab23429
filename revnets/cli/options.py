"""Arguments and options that several commands share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from revnets.config.errors import option_error

_MODEL = (
    "YAML file of a net (docs/reference/yaml.md), name of a timm model (revcol_tiny), hf:FOLDER of a transformers "
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
        help="Import and run classes of other projects that the configuration names, such as a block of your own.",
    ),
]


Reversible = Annotated[
    float | None,
    typer.Option(
        metavar="BLEND",
        help="Rewire the residual blocks of an ordinary network, such as timm's vit_base_patch16_224, with this blend "
        "(0.1, say): revnets.make_reversible.",
        show_default=False,
    ),
]


InputShape = Annotated[
    str | None,
    typer.Option("--input", help="Shape of one sample, e.g. 3,224,224 (images), 197,768 (tokens) or 64 (vectors)."),
]


def sample_shape(text: str | None) -> tuple[int, ...] | None:
    """The shape that `--input` names; an axis is set off by a comma or an x."""
    if text is None:
        return None
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        problem = f"{text!r} is no shape; give positive whole numbers such as 3,224,224"
        raise typer.BadParameter(problem, param_hint="--input")
    return shape


def check_place(option: str, path: Path) -> None:
    """Look at where a command is to write a file, before any work is done.

    Raises:
        revnets.SpecError: a file could not be written there; names the option that asks for it.
    """
    if path.is_dir():
        raise option_error(option, f"{path} is a folder", "Give the name of a file", code="not-a-file")
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise option_error(
            option, f"{folder} is no folder that can be written to", "Give another", code="unwritable-file"
        )


def picture_path(param: typer.CallbackParam, path: Path | None) -> Path | None:
    """Refuse a suffix that no picture has, and a place for no file, before any work is done."""
    from revnets.plotting.style import FORMATS

    if path is not None:
        if path.suffix.lower().removeprefix(".") not in FORMATS:
            known = ", .".join(FORMATS)
            raise typer.BadParameter(f"{path}: a picture is saved as .{known}; give the file one of these")
        check_place(param.opts[0], path)
    return path
