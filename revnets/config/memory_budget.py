"""How much memory a training step may take, as a YAML or a caller says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

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


def parse_bytes(value: int | str, key: str = "budget") -> int:
    """Bytes from a whole number or from text such as `24GiB`, `800 MB`.

    Args:
        key: of the value, for the error.

    Raises:
        ValueError: says what is allowed.
    """
    try:
        text = str(value).strip()  # a long integer has none
        digits = text.rstrip("BKMGTkmgtib ")
        unit = text[len(digits) :].strip()
        number = float(digits)
        scale = {name.lower(): size for name, size in _UNITS.items()}[unit.lower()]
    except (ValueError, KeyError):
        number, scale = 0.0, 1
    if not 1 <= number * scale < float("inf"):
        raise ArgumentError(
            f"{_shown(value)} is no amount of memory; write a number of bytes, or for example 24GiB or 800MB", key
        )
    return int(number * scale)


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", 1)
    for binary in ("", "i")
}


def parse_link(value: int | str) -> int:
    """Bytes a second from a whole number or from text such as `25GB/s`.

    Raises:
        ValueError: says what is allowed.
    """
    try:
        amount, _, unit = str(value).partition("/")
        if isinstance(value, str) and unit.strip() != "s":
            raise ValueError
        return parse_bytes(amount, "link")
    except ValueError:
        text = f"{_shown(value)} is no speed of a link; write bytes a second, or for example 25GB/s"
        raise ArgumentError(text, "link") from None


def parse_flops(value: float | str) -> float:
    """Floating point operations a second from a number or from text such as `300TFLOP/s`.

    Raises:
        ValueError: says what is allowed.
    """
    found = re.fullmatch(r"\s*([0-9.]{1,20})\s*([kMGTP]?)FLOP/s\s*", value) if isinstance(value, str) else None
    try:
        number = float(found[1]) * 1000.0 ** " kMGTP".index(found[2] or " ") if found else float(value)
    except TypeError:
        text = f"{what(value)}; write FLOP a second, or for example 300TFLOP/s"
        raise ArgumentError(text, "flops", "wrong-type") from None
    except (ValueError, OverflowError):
        number = 0.0
    if not 1 <= number < float("inf"):
        text = f"{_shown(value)} is no rate of operations; write FLOP a second, or for example 300TFLOP/s"
        raise ArgumentError(text, "flops")
    return number


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else show(value)


_REMEDY = "Give a number of bytes, text such as 24GiB, or a memory mode, whose peak is meant"


def _quantity(parse: Callable[[Any], Any], kinds: tuple[type, ...], name: str, remedy: str) -> BeforeValidator:
    """A validator of values that `parse` reads. They stay as they are, so that a specification prints as it was."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise problem(what(value), remedy, code="wrong-type")
        try:
            parse(value)
        except ValueError:
            raise problem(f"{show(value)} is no {name}", remedy) from None
        return value

    return BeforeValidator(check)


def _among(*known: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is not None and value not in known:
            raise problem(
                f"{show(value)} is none of the choices", nearest(value, known, "Choose among"), code="unknown-choice"
            )
        return value

    return BeforeValidator(check)


class HostMemory(NamedTuple):
    """Memory of the host into which a training step may move what cells keep, and what a move costs."""

    bytes: int
    link: float = 25e9  # bytes a second, in each direction
    flops: float | None = None  # operations a second that the device reaches; None to measure them


def host_memory(
    host: int | str | None, link: int | str = "25GB/s", flops: float | str | None = None
) -> HostMemory | None:
    """The host memory of a budget, from values as YAML has them; None if none may be used.

    Raises:
        ValueError: a value cannot be used; `key` is its name.
    """
    if host is None:
        return None
    rate = None if flops is None else parse_flops(flops)
    return HostMemory(parse_bytes(host, "host"), parse_link(link), rate)


_Budget = _quantity(parse_budget, (int, str), "amount of memory", _REMEDY)
_Bytes = _quantity(parse_bytes, (int, str), "amount of memory", "Give a number of bytes, or text such as 64GiB")
_Link = _quantity(parse_link, (int, str), "speed of a link", "Give bytes a second, or text such as 25GB/s")
_Flops = _quantity(parse_flops, (int, float, str), "rate of operations", "Give FLOP a second, or text: 300TFLOP/s")


class BudgetSpec(Strict):
    """What a step may take in one process, and what else has to fit into it."""

    budget: Annotated[int | str, _Budget] = Field(examples=["24GiB"])
    optimizer: Annotated[str, _among(*OPTIMIZERS)] = "adamw"
    grad_accum: int = Field(default=1, ge=1)  # forward passes per update; with several, gradients are there all along
    ranks: int | None = Field(default=None, ge=1)
    sharding: Annotated[str | None, _among(*SHARDINGS)] = None
    host: Annotated[int | str | None, _Bytes] = None  # memory of the host that may be used besides
    link: Annotated[int | str, _Link] = "25GB/s"  # between device and host
    flops: Annotated[int | float | str | None, _Flops] = None  # a second, of the device

    @model_validator(mode="after")
    def _of_the_host(self) -> BudgetSpec:
        for key in ("link", "flops"):
            if self.host is None and key in self.model_fields_set:
                text = f"{key} is about host memory, but none may be used"
                raise problem(text, "Add it, as in `host: 64GiB`", key, code="conflicting-values")
        return self

    def __setstate__(self, state: dict[Any, Any]) -> None:
        # An older pickle lacks the keys of host memory.
        defaults = {name: field.default for name, field in type(self).model_fields.items() if not field.is_required()}
        super().__setstate__({**state, "__dict__": {**defaults, **state["__dict__"]}})

    def __str__(self) -> str:
        host = "" if self.host is None else f", {self.host} of host memory"
        return f"planned for {self.budget}" + ("'s peak" if self.budget in list(Memory) else "") + host
