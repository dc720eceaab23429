"""How much memory a training step may take, as a YAML or a caller says it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from revnets.config.errors import ArgumentError, nearest, problem, show, what
from revnets.config.loader import Strict
from revnets.engine.memory_mode import Memory

OPTIMIZERS = {"none": 0, "sgd": 1, "lion": 1, "adam": 2, "adamw": 2}
"""Tensors of a parameter's size that an optimizer holds; sgd with momentum."""

SHARDINGS = ("ddp", "fsdp")


def parse_budget(value: int | str) -> int | Memory:
    """A budget: bytes as `parse_bytes` reads them, or a memory mode, which stands for the peak of that mode.

    `exact` is the budget that costs nothing: gradients come into being during backward, and until then cells can keep
    what they save in the room that gradients will take.

    Raises:
        ValueError: says what is allowed.
    """
    if value in list(Memory):
        return Memory(value)
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ArgumentError(f"{error}, or {', '.join(Memory)} for the peak of that memory mode", "budget") from None


def parse_bytes(value: int | str) -> int:
    """Bytes from a whole number or from text such as `24GiB`, `800 MB`.

    Raises:
        ValueError: says what is allowed.
    """
    text = str(value).strip()
    digits = text.rstrip("BKMGTkmgtib ")
    unit = text[len(digits) :].strip()
    try:
        number = float(digits)
        scale = {name.lower(): size for name, size in _UNITS.items()}[unit.lower()]
    except (ValueError, KeyError):
        number, scale = 0.0, 1
    if not 1 <= number * scale < float("inf"):
        raise ArgumentError(
            f"{value!r} is no amount of memory; write a number of bytes, or for example 24GiB or 800MB", "budget"
        )
    return int(number * scale)


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", 1)
    for binary in ("", "i")
}


_REMEDY = "Give a number of bytes, text such as 24GiB, or a memory mode, whose peak is meant"


def _amount(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise problem(what(value), _REMEDY, code="wrong-type")
    try:
        parse_budget(value)
    except ValueError:
        raise problem(f"{show(value)} is no amount of memory", _REMEDY) from None
    return value


def _among(*known: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is not None and value not in known:
            raise problem(
                f"{show(value)} is none of the choices", nearest(value, known, "Choose among"), code="unknown-choice"
            )
        return value

    return BeforeValidator(check)


class BudgetSpec(Strict):
    """What a step may take in one process, and what else has to fit into it."""

    budget: Annotated[int | str, BeforeValidator(_amount)] = Field(examples=["24GiB"])
    optimizer: Annotated[str, _among(*OPTIMIZERS)] = "adamw"
    grad_accum: int = Field(default=1, ge=1)  # forward passes per update; with several, gradients are there all along
    ranks: int | None = Field(default=None, ge=1)
    sharding: Annotated[str | None, _among(*SHARDINGS)] = None

    def __str__(self) -> str:
        return f"planned for {self.budget}" + ("'s peak" if self.budget in list(Memory) else "")
