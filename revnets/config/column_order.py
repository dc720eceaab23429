"""Configuration of single columns: their directions, and the constant input of one column."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from revnets.config.errors import nearest, problem, show, what
from revnets.config.loader import Strict
from revnets.config.memory_budget import BudgetSpec
from revnets.engine.graph import DIRECTIONS

MAX_COUNT = 10_000
"""Largest number of columns, and of blocks per level. Larger numbers are typing errors."""

MAX_AXES, MAX_POSITIONS = 3, 1_000_000
"""Largest number of axes, and of positions, of a constant."""


def one_or_per_column(noun: str, known: Sequence[str], more: str = "") -> BeforeValidator:
    """Return a validator that accepts one of the known words, or a list of one word per column.

    Args:
        noun: Name of the value in errors, such as `direction`.
        known: Accepted words.
        more: Further accepted form, appended to the hint of errors. Mappings pass unchecked.
    """

    def check(value: Any) -> Any:
        if isinstance(value, (dict, BudgetSpec)):
            return value
        given = tuple(value) if isinstance(value, (list, tuple)) else value
        for word in given if isinstance(given, tuple) else (given,):
            if not isinstance(word, str):
                remedy = f"Give {', '.join(known)}, or a list of one per column{more}"
                raise problem(what(word), remedy, code="wrong-type")
            if word not in known:
                remedy = nearest(word, known, "Choose among")
                raise problem(f"{show(word)} is not a {noun}", remedy, code="unknown-choice")
        return given

    return BeforeValidator(check)


Directions = Annotated[str | tuple[str, ...], one_or_per_column("direction", DIRECTIONS)]


def count_columns(data: dict[str, Any]) -> dict[str, Any]:
    """Expand `columns: {up: 2, down: 2}` to `columns: 4` and `direction: [up, up, down, down]`.

    The validator of the network calls this before it checks single keys.
    """
    counts: dict[str, Any] = data["columns"]
    for key, count in counts.items():
        if key not in DIRECTIONS:
            remedy = nearest(key, DIRECTIONS, "Known keys are")
            raise problem(f"unknown key (value {show(count)})", remedy, "columns", key, code="unknown-key")
        if isinstance(count, bool) or not isinstance(count, int):
            raise problem(what(count), "Give a whole number", "columns", key, code="wrong-type")
        if not 0 <= count <= MAX_COUNT:
            text = f"{show(count)} is not a valid number of columns"
            raise problem(text, f"Give 0 to {MAX_COUNT}", "columns", key, code="out-of-range")
    up, down = (counts.get(direction, 0) for direction in DIRECTIONS)
    if not up:
        text = "no column runs up, but the stem needs one: its output enters at level 0"
        raise problem(text, "Give at least 1", "columns", "up", code="out-of-range")
    if "direction" in data:
        text = "the mapping of columns already sets the directions"
        remedy = "Remove this key, or give columns as a number"
        raise problem(text, remedy, "direction", code="conflicting-values")
    return {**data, "columns": up + down, "direction": ["up"] * up + ["down"] * down if down else "up"}


def _axes(value: Any) -> Any:
    """Convert a list, or the length of a single axis, to a tuple."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


class ConstantSpec(Strict):
    """A learned constant that is an input of the first level of a column, such as the mask tokens of a decoder."""

    column: int = Field(ge=0, examples=[2])
    positions: Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_COUNT)], ...], BeforeValidator(_axes)] = ()

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if len(self.positions) > MAX_AXES or prod(self.positions) > MAX_POSITIONS:
            remedy = f"Give at most {MAX_AXES} axes with a total of {MAX_POSITIONS:,} positions"
            raise problem(f"{show(self.positions)} is too large", remedy, "positions", code="out-of-range")
        return self
