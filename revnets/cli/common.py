"""Helpers of the commands show, audit and plan: the model, its input and the figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import nn

from revnets.cli.output import reporting_unwritable
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

    with reporting_unwritable(picture):
        save(figure, picture)
    console.print(f"wrote {picture}", soft_wrap=True, highlight=False, markup=False)


def reversible_model(
    source: str, overrides: Sequence[str], trust: bool = True, blend: float | None = None, remedy: str = ""
) -> nn.Module:
    """Load a model with reversible columns.

    Args:
        source: Model, as in `load_model`.
        overrides: Overrides `key=value`.
        trust: Whether a YAML file may name classes of other projects.
        blend: Make a network of ordinary blocks reversible with this blend.
        remedy: Hint for a model that is not reversible.

    Raises:
        SpecError: If the model cannot be built or has no reversible columns.
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
"""Hint of commands with this option."""


def input_error(source: str, shape: tuple[int, ...], error: Exception) -> SpecError:
    """Return the error for an input that the model rejects."""
    reason = str(error).splitlines()[0]
    problem = f"the model rejects an input of shape {shape} ({reason})"
    return SpecError(source, "", problem, "Give --input", code="input-rejected")


def parse_dtype(name: str) -> torch.dtype:
    """Return a floating point dtype by name.

    Raises:
        SpecError: If the name is not float32, bfloat16 or float16.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise option_error(
            "--dtype", f"unknown dtype (value {name})", f"Choose {', '.join(known)}", code="unknown-choice"
        )
    return known[name]


def sample_shape_of(net: nn.Module, source: str) -> tuple[int, ...]:
    """Return the shape of one sample that the model declares.

    Raises:
        SpecError: If the model declares no shape.
    """
    shape = example_shape(net)
    if shape is None:
        raise SpecError(
            source,
            "stem",
            "the model declares no input shape",
            "Give --input, e.g. --input 3,224,224",
            code="missing-shape",
        )
    return shape
