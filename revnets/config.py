"""From YAML text to a frozen pydantic model: base files, overrides, and one clear error for whatever is wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from revnets.registry import importable

M = TypeVar("M", bound=BaseModel)
Source = str | Path | Mapping[str, Any]

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")


class SpecError(ValueError):
    """Something in a configuration cannot be used: names the file, the key path, the value and the remedy."""

    def __init__(self, source: str, key: str, problem: str, remedy: str):
        where = f"{source}: {key}" if key else source
        super().__init__(f"{where}: {problem}. {remedy}" if remedy else f"{where}: {problem}.")
        self.source, self.key, self.problem, self.remedy = source, key, problem, remedy


class Strict(BaseModel):
    """Base of all configuration models: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


def problem(text: str, remedy: str, *keys: str | int) -> PydanticCustomError:
    """What a validator raises: a problem at `keys` below its own place, and what to do about it."""
    escape = {"problem": text, "remedy": remedy, "keys": keys}
    return PydanticCustomError("spec", "{problem}", escape)


def load(model: type[M], source: Source, overrides: Sequence[str] = ()) -> M:
    """Read a YAML file (or take a dict), apply `base:` and overrides, and validate.

    Args:
        model: the pydantic model to fill.
        source: path of a YAML file, or a mapping of the same form.
        overrides: `key.path=value`, applied last; list items by number, as in `levels.2.depth=6`.

    Raises:
        SpecError: for everything that is wrong with the file, its bases, the overrides or the values.
    """
    if isinstance(source, Mapping):
        name, folder, data = "dict", Path.cwd(), _copy(source)
        if "base" in data:
            data = _merge(_read_base(Path(str(data.pop("base"))), name, ()), data)
    else:
        name, folder = str(source), Path(source).resolve().parent
        data = _read(Path(source), ())
    for override in overrides:
        _override(data, override)
    with importable(folder, Path.cwd()):
        try:
            return model.model_validate(data)
        except ValidationError as error:
            _explain(error, name, model)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    name = str(path)
    if path.resolve() in seen:
        chain = " -> ".join(str(item) for item in (*seen, path.resolve()))
        raise SpecError(name, "base", f"the files are based on each other: {chain}", "Break the circle")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = get_close_matches(path.name, [item.name for item in path.parent.glob("*.y*ml")], n=1)
        hint = f"Did you mean {path.parent / near[0]}?" if near else "Check the path"
        raise SpecError(name, "", "there is no such file", hint) from None
    except IsADirectoryError:
        raise SpecError(name, "", "this is a folder", "Give a YAML file inside of it") from None
    except UnicodeDecodeError as error:
        raise SpecError(name, "", f"not UTF-8 text (byte {error.start})", "Save it as UTF-8 YAML") from None
    except OSError as error:
        raise SpecError(name, "", f"cannot be read ({error.strerror})", "Check its permissions") from None
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError(name, "", f"not valid YAML: {where}{what}", "Correct that line") from None
    if data is None:
        raise SpecError(name, "", "the file is empty", "It needs at least columns, stem and levels (docs/yaml.md)")
    if not isinstance(data, dict):
        raise SpecError(name, "", f"holds {_kind(data)}, not keys with values", "Write `key: value` lines")
    if "base" in data:
        base = data.pop("base")
        if not isinstance(base, str):
            raise SpecError(name, "base", f"{base!r} is {_kind(base)}", "Give the path of one YAML file")
        data = _merge(_read_base(path.parent / base, name, (*seen, path.resolve())), data)
    return data


def _read_base(path: Path, child: str, seen: tuple[Path, ...]) -> dict[str, Any]:
    if not path.exists():
        raise SpecError(child, "base", f"there is no file {path}", "Give its path relative to this file")
    return _read(path, seen)


class _Loader(yaml.SafeLoader):
    """Safe YAML that does not let a key be given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is no text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _merge(base: Any, over: Any) -> Any:
    """`over` wins; mappings are merged key by key, everything else is replaced."""
    if isinstance(base, dict) and isinstance(over, dict):
        return {key: _merge(base[key], over[key]) if key in base and key in over else {**base, **over}[key]
                for key in {**base, **over}}
    return over


def _override(data: Any, text: str) -> None:
    path, equals, value_text = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise SpecError("command line", text, "an override has the form key.path=value", "For example levels.2.depth=6")
    try:
        value = float(value_text) if _EXPONENT.fullmatch(value_text.strip()) else yaml.load(value_text, _Loader)
    except yaml.YAMLError:
        raise SpecError("command line", path, f"{value_text!r} is not a YAML value", "Quote it") from None
    place = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        where = ".".join(keys[: depth + 1])
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                raise SpecError("command line", where, f"a list of {len(place)} items", f"Use 0 to {len(place) - 1}")
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
            if not last:
                place.setdefault(key, {})
        else:
            raise SpecError("command line", where, f"{'.'.join(keys[:depth])} is {_kind(place)}, not a mapping",
                            f"Set {'.'.join(keys[:depth])} itself")
        if last:
            place[index] = value
        else:
            place = place[index]


def _explain(error: ValidationError, source: str, model: type[BaseModel]) -> NoReturn:
    """Turn pydantic's first complaint into one line."""
    first = error.errors(include_url=False)[0]
    location = tuple(key for key in first["loc"] if not (isinstance(key, str) and "[" in key))
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "spec":
        key = _path((*location, *context["keys"]))
        raise SpecError(source, key, context["problem"], context["remedy"]) from None
    key = _path(location)
    if kind == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        near = get_close_matches(str(location[-1]), known, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}"
        raise SpecError(source, key, f"unknown key {location[-1]!r} (value {_short(value)})", hint) from None
    if kind == "missing":
        raise SpecError(source, key, "this key is required and missing", "Add it (docs/yaml.md)") from None
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        mantissa, exponent = re.split("[eE]", value)
        better = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent if exponent[0] in '+-' else '+' + exponent}"
        raise SpecError(source, key, f"YAML reads {value} as text, not as a number", f"Write {better}") from None
    text = first["msg"][0].lower() + first["msg"][1:]
    raise SpecError(source, key, f"{_short(value)} is {_kind(value)}: {text}", "") from None


def _fields_at(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys that the model at this place knows."""
    for key in location:
        if isinstance(key, str) and key in model.model_fields:
            found = _models_in(model.model_fields[key].annotation)
            if found:
                model = found[0]
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def _path(location: Sequence[Any]) -> str:
    return ".".join(str(key) for key in location)


def _kind(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", tuple: "a list", str: "text", bool: "true/false", int: "a whole number",
             float: "a number", type(None): "nothing"}
    return names.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, (list, tuple)) else value
