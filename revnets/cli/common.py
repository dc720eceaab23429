"""What the commands show, audit and plan share: the model, its input and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import nn

from revnets.cli.output import told_if_unwritable
from revnets.config.errors import SpecError, option_error
from revnets.engine.columns_group import find_columns
from revnets.engine.errors import ArgumentError
from revnets.models.example_inputs import example_shape
from revnets.models.loading import load_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_figure(console: Console, figure: Figure, picture: Path) -> None:
    """Save a figure and print its path."""
    from revnets.plotting.style import save

    with told_if_unwritable(picture):
        save(figure, picture)
    console.print(f"wrote {picture}", soft_wrap=True, highlight=False, markup=False)


def reversible_model(
    source: str, overrides: Sequence[str], trust: bool = True, blend: float | None = None, remedy: str = ""
) -> nn.Module:
    """The model that a command is about, if it is one for it.

    Args:
        blend: make a network of ordinary blocks reversible, with this blend.
        remedy: what the user of this command can do for a model that is not reversible.
    """
    net = load_model(source, overrides, trust=trust)
    try:
        if blend is not None:
            from revnets.pretrained import make_reversible

            make_reversible(net, blend)
        find_columns(net)
    except ArgumentError as error:
        key = "" if blend is None else error.key
        raise SpecError(source, key, str(error), remedy, code=error.code) from None
    return net


REWIRE = "Give --reversible 0.1 to rewire its blocks"
"""What helps a command that has this option."""


def input_error(source: str, shape: tuple[int, ...], error: Exception) -> SpecError:
    """The error for an input that the model does not take."""
    reason = str(error).splitlines()[0]
    return SpecError(
        source, "", f"an input of {shape} does not go through ({reason})", "Give --input", code="input-rejected"
    )


def parse_dtype(name: str) -> torch.dtype:
    """A floating point type by its name."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise option_error(
            "--dtype", f"unknown dtype (value {name})", f"Choose {', '.join(known)}", code="unknown-choice"
        )
    return known[name]


def sample_shape_of(net: nn.Module, source: str) -> tuple[int, ...]:
    """A shape of one sample that the model says it takes."""
    shape = example_shape(net)
    if shape is None:
        raise SpecError(
            source,
            "stem",
            "does not say what shape it takes",
            "Give --input, e.g. --input 3,224,224",
            code="missing-shape",
        )
    return shape
