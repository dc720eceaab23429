"""The specification of a net: what a YAML may say, checked as far as it can be without building anything."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from revnets.columns import memory_modes
from revnets.config import Source, Strict, load, problem
from revnets.graph import Graph, ReadError, ReadToken, wire
from revnets.registry import PROVIDED, PartError, find, options


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Reads = Annotated[tuple[ReadToken, ...], BeforeValidator(_as_tuple)]


class PartSpec(Strict):
    """A stem, fusion or head: its name and options. `linear` alone means `{type: linear}`."""

    type: str
    options: dict[str, Any] = {}


def _split_part(kind: str):
    def split(value: Any) -> Any:
        if isinstance(value, PartSpec):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict) or not isinstance(value.get("type"), str):
            raise problem(f"{value!r} names no {kind}", f"Write {{type: name, ...}} with the options of the {kind}")
        given = {key: item for key, item in value.items() if key != "type"}
        return {"type": value["type"], "options": _checked(kind, value["type"], given, ("type",), "type")}

    return split


class LevelSpec(Strict):
    """One level of every column: its width, its blocks and, where it differs from the net's, what it reads."""

    dim: int = Field(gt=0)
    depth: int = Field(ge=0)
    block: str
    stride: int | None = Field(default=None, ge=1)
    reads: Reads | None = None
    options: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "options" in value or not isinstance(value.get("block"), str):
            return value
        own = [key for key in cls.model_fields if key != "options"]
        level = {key: value[key] for key in own if key in value}
        given = {key: item for key, item in value.items() if key not in own}
        return {**level, "options": _checked("block", value["block"], given, own, "block")}


class GainSpec(Strict):
    """gamma of every level: its first value, the bound of |gamma|, and whether it is learned."""

    init: float = 0.5
    min_abs: float = Field(default=1e-3, gt=0)
    learn: bool = True

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if abs(self.init) < self.min_abs:
            raise problem(f"{self.init} is nearer to 0 than min_abs {self.min_abs}", "Raise it, or lower min_abs", "init")
        return self


class NetSpec(Strict):
    """A whole net. Only `columns`, `stem` and `levels` are required; docs/yaml.md describes every key."""

    model_config = ConfigDict(title="net")

    columns: int = Field(ge=1)
    stem: Annotated[PartSpec, BeforeValidator(_split_part("stem"))]
    levels: Annotated[tuple[LevelSpec, ...], BeforeValidator(_as_tuple)]
    fusion: Annotated[PartSpec, BeforeValidator(_split_part("fusion"))] = PartSpec(type="convnext")
    reads: Reads = ("below", "above")
    gain: GainSpec = GainSpec()
    memory: Annotated[str | tuple[str, ...], BeforeValidator(_as_tuple)] = "exact"
    taps: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = ()
    head: Annotated[PartSpec | None, BeforeValidator(lambda value: value and _split_part("head")(value))] = None
    drop_path: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        m = len(self.levels)
        if m < 2:
            raise problem(f"{m} level(s) given", "A reversible column has at least 2", "levels")
        for index, level in enumerate(self.levels):
            own = level.reads is not None
            try:
                wire(m, m, [level.reads if own else self.reads] * m)
            except ReadError as error:
                place = ("levels", index, "reads") if own else ("reads",)
                raise problem(str(error), "Choose another read", *place) from None
        for tap in self.taps:
            if not 0 <= tap < self.columns:
                raise problem(f"tap {tap} is beyond the last column", f"Use 0 to {self.columns - 1}", "taps")
        try:
            memory_modes(self.memory, self.columns)
        except ValueError as error:
            raise problem(str(error), "See docs/yaml.md", "memory") from None
        return self

    def graph(self) -> Graph:
        """Nodes and wires of the whole net."""
        m = len(self.levels)
        reads = [self.reads if level.reads is None else level.reads for level in self.levels]
        return wire(self.columns * m, m, reads)

    def reductions(self) -> list[int]:
        """By how much the resolution of each level is reduced against the stem's output, per side."""
        default = getattr(find("fusion", self.fusion.type), "default_stride", 1)
        found, reduction = [], 1
        for index, level in enumerate(self.levels):
            reduction *= level.stride or (default if index else 1)
            found.append(reduction)
        return found


def load_spec(source: Source | NetSpec, overrides: Sequence[str] = ()) -> NetSpec:
    """Read and check the specification of a net.

    Args:
        source: path of a YAML file, a mapping of the same form, or a spec.
        overrides: `key.path=value` pairs, such as `columns=8` or `levels.2.depth=6`.

    Raises:
        revnets.SpecError: names the file, the key, the value and the remedy.
    """
    if isinstance(source, NetSpec):
        if not overrides:
            return source
        source = dump(source)
    return load(NetSpec, source, overrides)


def dump(spec: NetSpec) -> dict[str, Any]:
    """The spec as plain data that `load_spec` accepts."""
    data = spec.model_dump(exclude_defaults=True)
    for key in ("stem", "fusion", "head"):
        if key in data:
            data[key] = {"type": data[key]["type"], **data[key].get("options", {})}
    data["levels"] = [{**{k: v for k, v in level.items() if k != "options"}, **level.get("options", {})}
                      for level in data["levels"]]
    return data


def _checked(kind: str, name: str, given: dict[str, Any], known: Sequence[str], key: str) -> dict[str, Any]:
    """The options of a part, checked against its signature: names, required ones, and annotated types."""
    try:
        allowed = options(kind, name)
    except PartError as error:
        raise problem(error.problem, error.remedy, key) from None
    checked = {}
    for option, value in given.items():
        if option not in allowed:
            if "**" in allowed:
                checked[option] = value
                continue
            choices = [*allowed, *known]
            near = get_close_matches(option, choices, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(allowed) or 'none'}"
            if option in PROVIDED[kind]:
                hint = "It follows from the levels and cannot be set"
            raise problem(f"{kind} {name!r} has no option {option!r} (value {value!r})", hint, option)
        checked[option] = _typed(option, value, allowed[option])
    for option, parameter in allowed.items():
        if option != "**" and parameter.default is inspect.Parameter.empty and option not in checked:
            raise problem(f"{kind} {name!r} needs the option {option!r}", f"Add `{option}: ...`", option)
    return checked


def _typed(option: str, value: Any, parameter: inspect.Parameter) -> Any:
    annotation = parameter.annotation
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return value
    if isinstance(value, list):
        value = tuple(value)
    try:
        return TypeAdapter(annotation, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        text = error.errors()[0]["msg"]
        hint = "YAML reads 1e-3 as text; write 1.0e-3" if isinstance(value, str) and value[:1].isdigit() else text
        raise problem(f"{value!r} does not fit the option ({annotation})", hint, option) from None
