"""Memory budgets: parsing of amounts and rates, and the specification of a budget in YAML."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from revnets.config.errors import ArgumentError, nearest, problem, show, what
from revnets.config.loader import Strict
from revnets.engine.memory_mode import Memory

OPTIMIZERS = {"none": 0, "sgd": 1, "lion": 1, "adam": 2, "adamw": 2}
"""Tensors of a parameter's size in the state of each optimizer. sgd is with momentum."""

SHARDINGS = ("ddp", "fsdp")


def parse_budget(value: int | str) -> int | Memory:
    """Parse a budget: an amount of memory (see `parse_bytes`), or a memory mode whose peak is the budget.

    A budget of `exact` needs no more memory than mode `exact` but less compute: until backward allocates the
    gradients, cells can use the memory that gradients will take.

    Args:
        value: Bytes, text such as `24GiB`, or a memory mode.

    Returns:
        Bytes, or the memory mode.

    Raises:
        ValueError: If the value is neither.
    """
    if value in list(Memory):
        return Memory(value)
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ArgumentError(f"{error}, or {', '.join(Memory)} for the peak of that memory mode", "budget") from None


def parse_bytes(value: int | str, key: str = "budget") -> int:
    """Parse an amount of memory: a number of bytes, or text such as `24GiB` or `800 MB`.

    Args:
        value: Amount of memory.
        key: Name of the value in errors.

    Returns:
        Bytes.

    Raises:
        ValueError: If the value is not an amount of memory of at least one byte.
    """
    try:
        text = str(value).strip()  # raises ValueError for a very long integer
        digits = text.rstrip("BKMGTkmgtib ")
        unit = text[len(digits) :].strip()
        number = float(digits)
        scale = {name.lower(): size for name, size in _UNITS.items()}[unit.lower()]
    except (ValueError, KeyError):
        number, scale = 0.0, 1
    if not 1 <= number * scale < float("inf"):
        raise ArgumentError(
            f"{_shown(value)} is not an amount of memory; write a number of bytes, or text such as 24GiB or 800MB", key
        )
    return int(number * scale)


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", 1)
    for binary in ("", "i")
}


def parse_link(value: int | str) -> int:
    """Parse the speed of a link: bytes per second, or text such as `25GB/s`.

    Args:
        value: Speed of the link.

    Returns:
        Bytes per second.

    Raises:
        ValueError: If the value is not a speed.
    """
    try:
        amount, _, unit = str(value).partition("/")
        if isinstance(value, str) and unit.strip() != "s":
            raise ValueError
        return parse_bytes(amount, "link")
    except ValueError:
        text = f"{_shown(value)} is not the speed of a link; write bytes per second, or text such as 25GB/s"
        raise ArgumentError(text, "link") from None


def parse_flops(value: float | str) -> float:
    """Parse the speed of a device: floating point operations per second, or text such as `300TFLOP/s`.

    Args:
        value: Speed of the device.

    Returns:
        Floating point operations per second.

    Raises:
        ValueError: If the value is not a speed.
    """
    found = re.fullmatch(r"\s*([0-9.]{1,20})\s*([kMGTP]?)FLOP/s\s*", value) if isinstance(value, str) else None
    try:
        number = float(found[1]) * 1000.0 ** " kMGTP".index(found[2] or " ") if found else float(value)
    except TypeError:
        text = f"{what(value)}; write FLOPs per second, or text such as 300TFLOP/s"
        raise ArgumentError(text, "flops", "wrong-type") from None
    except (ValueError, OverflowError):
        number = 0.0
    if not 1 <= number < float("inf"):
        text = f"{_shown(value)} is not the speed of a device; write FLOPs per second, or text such as 300TFLOP/s"
        raise ArgumentError(text, "flops")
    return number


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else show(value)


_REMEDY = "Give a number of bytes, text such as 24GiB, or a memory mode, whose peak is then the budget"


def _quantity(parse: Callable[[Any], Any], kinds: tuple[type, ...], name: str, remedy: str) -> BeforeValidator:
    """Return a validator for values that `parse` accepts. It keeps them unparsed, so that a spec prints as written."""

    def check(value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise problem(what(value), remedy, code="wrong-type")
        try:
            parse(value)
        except ValueError:
            raise problem(f"{show(value)} is not {name}", remedy) from None
        return value

    return BeforeValidator(check)


def _among(*known: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is not None and value not in known:
            raise problem(
                f"{show(value)} is not a valid choice", nearest(value, known, "Choose among"), code="unknown-choice"
            )
        return value

    return BeforeValidator(check)


class HostMemory(NamedTuple):
    """Host memory to which a training step may move what cells save, and the cost of a move.

    Attributes:
        bytes: Size of the host memory that may be used.
        link: Bytes per second between device and host, in each direction.
        flops: Floating point operations per second of the device, or None to measure them.
    """

    bytes: int
    link: float = 25e9
    flops: float | None = None


def host_memory(
    host: int | str | None, link: int | str = "25GB/s", flops: float | str | None = None
) -> HostMemory | None:
    """Parse the host memory of a budget from the values of a YAML file.

    Args:
        host: Amount of host memory, or None.
        link: Speed of the link between device and host.
        flops: Speed of the device, or None to measure it.

    Returns:
        The parsed values, or None if `host` is None.

    Raises:
        ValueError: If a value is invalid. Its attribute `key` is the name of the value.
    """
    if host is None:
        return None
    rate = None if flops is None else parse_flops(flops)
    return HostMemory(parse_bytes(host, "host"), parse_link(link), rate)


_Budget = _quantity(parse_budget, (int, str), "an amount of memory", _REMEDY)
_Bytes = _quantity(parse_bytes, (int, str), "an amount of memory", "Give a number of bytes, or text such as 64GiB")
_Link = _quantity(parse_link, (int, str), "the speed of a link", "Give bytes per second, or text such as 25GB/s")
_Flops = _quantity(
    parse_flops, (int, float, str), "the speed of a device", "Give FLOPs per second, or text such as 300TFLOP/s"
)


class BudgetSpec(Strict):
    """Memory budget of a training step in one process, and the settings that its memory depends on.

    Attributes:
        budget: Bytes, text such as `24GiB`, or a memory mode, whose peak is the budget.
        optimizer: Name of the optimizer, a key of `OPTIMIZERS`.
        grad_accum: Forward passes per update. With more than one, gradients exist during the whole step.
        ranks: Number of processes that train together, or None for that of the running job.
        sharding: `ddp`, `fsdp`, or None to detect it.
        host: Host memory that may be used in addition, or None.
        link: Speed of the link between device and host.
        flops: Speed of the device, or None to measure it.
    """

    budget: Annotated[int | str, _Budget] = Field(examples=["24GiB"])
    optimizer: Annotated[str, _among(*OPTIMIZERS)] = "adamw"
    grad_accum: int = Field(default=1, ge=1)
    ranks: int | None = Field(default=None, ge=1)
    sharding: Annotated[str | None, _among(*SHARDINGS)] = None
    host: Annotated[int | str | None, _Bytes] = None
    link: Annotated[int | str, _Link] = "25GB/s"
    flops: Annotated[int | float | str | None, _Flops] = None

    @model_validator(mode="after")
    def _of_the_host(self) -> BudgetSpec:
        for key in ("link", "flops"):
            # A saved run lists all keys.
            if self.host is None and getattr(self, key) != type(self).model_fields[key].default:
                text = f"{key} has no effect without host memory"
                raise problem(text, "Add `host: 64GiB`, or remove this key", key, code="conflicting-values")
        return self

    def __setstate__(self, state: dict[Any, Any]) -> None:
        # Older pickles lack the keys for host memory.
        defaults = {name: field.default for name, field in type(self).model_fields.items() if not field.is_required()}
        super().__setstate__({**state, "__dict__": {**defaults, **state["__dict__"]}})

    def __str__(self) -> str:
        host = "" if self.host is None else f", {self.host} of host memory"
        return f"planned for {self.budget}" + ("'s peak" if self.budget in list(Memory) else "") + host
