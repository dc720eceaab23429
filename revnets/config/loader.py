"""From YAML text to a frozen pydantic model: base files, overrides, and one clear error for whatever is wrong."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Hashable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from revnets.config.errors import EXPONENT, Keys, SpecError, explain, option_error, path, show, what

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Source = str | Path | Mapping[str, Any]
Overrides = Sequence[str] | Mapping[str, Any]
"""`key.path=value` as text, or key paths and their values."""


class Strict(BaseModel):
    """Base of all configuration models: frozen, no unknown keys, no silent conversions, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Layer(dict[str, Any]):
    """The keys of one file (or dict), and the name under which its mistakes are reported."""

    def __init__(self, name: str, data: Any):
        super().__init__(_plain(name, (), data, ()))
        self.name = name


class Layers:
    """Files laid over each other. Remembers which one each value came from.

    Args:
        layers: the lowest first.
        folders: searched for the modules of components.
    """

    def __init__(self, layers: Sequence[Layer], folders: Sequence[Path] = ()):
        self.folders = folders
        self.data: dict[str, Any] = {}
        self.name = layers[-1].name
        self._origins: dict[Keys, str] = {}
        for layer in layers:
            self._merge(self.data, layer, (), layer.name)

    def _merge(self, data: dict[str, Any], over: dict[str, Any], place: Keys, name: str) -> None:
        """`over` wins. Mappings are merged key by key, unless their `type` changes; all else is replaced."""
        for key, value in over.items():
            old = data.get(key)
            if isinstance(old, dict) and isinstance(value, dict) and value.get("type") in (None, old.get("type")):
                self._merge(old, value, (*place, key), name)
            else:
                self._set(data, key, value, (*place, key), name)

    def _set(self, place: Any, key: Any, value: Any, keys: Keys, name: str) -> None:
        place[key] = value
        self._origins = {known: origin for known, origin in self._origins.items() if known[: len(keys)] != keys}
        self._origins[keys] = name

    def copy(self) -> Layers:
        """Layers that can be changed without changing these."""
        return copy.deepcopy(self)

    def apply(self, overrides: Overrides) -> None:
        """Set the values of all overrides."""
        if isinstance(overrides, Mapping):
            for place, value in overrides.items():
                self.set(place, value)
        else:
            for text in overrides:
                self.override(text)

    def override(self, text: str) -> None:
        """Apply one `key.path=value`."""
        name = "command line"
        place_text, equals, value_text = text.partition("=")
        keys = [key.strip() for key in place_text.split(".")]
        if not equals or not all(keys):
            raise SpecError(
                name,
                text,
                "an override has the form key.path=value",
                "For example levels.2.depth=6",
                code="invalid-override",
            )
        self.set(".".join(keys), parse_value(value_text, place_text))

    def set(self, key_path: str, value: Any) -> None:
        """Replace the value at `key.path`, or add it."""
        name, keys = "command line", key_path.split(".")
        value = _plain(name, tuple(keys), value, ())
        place: Any = self.data
        found: Keys = ()
        for key in keys[:-1]:
            index = _index(place, key, found)
            found = (*found, index)
            if isinstance(place, dict) and index not in place:
                self._set(place, index, {}, found, name)
            place = place[index]
        index = _index(place, keys[-1], found)
        self._set(place, index, value, (*found, index), name)

    def origin(self, keys: Keys) -> str:
        """The file that a value came from; of a missing one, the file that it is missing in."""
        prefixes = (keys[:length] for length in range(len(keys), 0, -1))
        return next((self._origins[prefix] for prefix in prefixes if prefix in self._origins), self.name)

    def check(self, model: type[M], **context: Any) -> M:
        """Validate the values.

        Args:
            model: the pydantic model to fill.
            context: for its validators, besides the `folders` of modules.

        Raises:
            SpecError: for the value that is wrong, under the name of the file that it came from.
        """
        try:
            return validate(TypeAdapter(model), self.data, {"folders": (*self.folders, Path.cwd()), **context})
        except ValidationError as error:
            keys, problem, remedy, code = explain(error, self.data, model)
            raise SpecError(self.origin(keys), path(keys), problem, remedy, code) from None


def load(model: type[M], source: Source, overrides: Overrides = ()) -> M:
    """Read a YAML file (or take a dict), apply `base:` and overrides, and validate.

    Args:
        model: the pydantic model to fill.
        source: path of a YAML file, or a mapping of the same form.
        overrides: `key.path=value`, applied last; list items by number, as in `levels.2.depth=6`.

    Raises:
        SpecError: for everything that is wrong with the file, its bases, the overrides or the values.
    """
    config = read_layers(source)
    config.apply(overrides)
    return config.check(model)


def read_layers(source: Source, name: str = "dict") -> Layers:
    """Read a YAML file and its bases, without looking at the values.

    Args:
        source: path of a YAML file, or a mapping of the same form.
        name: of a mapping, for error messages.

    Raises:
        SpecError: a file is missing, or is no YAML.
    """
    if isinstance(source, Mapping):
        return Layers(*_with_bases(Layer(name, source), Path.cwd(), ()))
    return Layers(*_read(Path(source), ()))


def parse_value(text: str, key: str = "") -> Any:
    """A value of the command line: YAML, in which 1e-3 is a number.

    Args:
        key: names the value in error messages.

    Raises:
        SpecError: it is no YAML.
    """
    try:
        return yaml.load(text, _CommandLineLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise option_error(
            key, f"{show(text)} is not a YAML value", "Put it in quotes", code="invalid-syntax"
        ) from None


def validate(adapter: TypeAdapter[T], data: Any, context: Mapping[str, Any] | None = None) -> T:
    """Validate by pydantic's strict rules for text: a list may stand for a tuple, text for a path or an enum.

    Data that no text can hold (a dict with classes in it) goes by the rules for Python.
    """
    try:
        text = json.dumps(data)
    except (TypeError, ValueError):
        return adapter.validate_python(data, context=context)
    return adapter.validate_json(text, context=context)


def _read(file: Path, seen: tuple[Path, ...]) -> tuple[list[Layer], list[Path]]:
    """The layers of a file, its bases first, and the folders in which they lie."""
    name = str(file)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(name, "", "there is no such file", _similar(file), code="missing-file") from None
    except IsADirectoryError:
        raise SpecError(name, "", "this is a folder", "Give a YAML file inside of it", code="not-a-file") from None
    except UnicodeDecodeError as error:
        raise SpecError(
            name, "", f"not UTF-8 text (byte {error.start})", "Save it as UTF-8 YAML", code="invalid-encoding"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            name, "", f"cannot be read ({reason})", "Check path and permissions", code="unreadable-file"
        ) from None
    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise SpecError(name, "", *_syntax(error), code="invalid-syntax") from None
    except RecursionError:
        raise SpecError(
            name, "", "not valid YAML: brackets nested too deep", "Close them", code="invalid-syntax"
        ) from None
    if data is None:
        raise SpecError(
            name, "", "the file is empty", "Write `key: value` lines (docs/reference/yaml.md)", code="empty-file"
        )
    if not isinstance(data, dict):
        remedy = "Write `key: value` lines (docs/reference/yaml.md)"
        raise SpecError(name, "", f"no keys with values: {what(data)}", remedy, code="wrong-format")
    return _with_bases(Layer(name, data), file.parent, (*seen, file.resolve()))


def _with_bases(layer: Layer, folder: Path, seen: tuple[Path, ...]) -> tuple[list[Layer], list[Path]]:
    if "base" not in layer:
        return [layer], [folder.resolve()]
    base = layer.pop("base")
    if not isinstance(base, str):
        raise SpecError(
            layer.name, "base", what(base), "Give the path of one YAML file, relative to this one", code="wrong-type"
        )
    file = folder / base
    try:
        absolute, there = file.resolve(), file.exists()
    except (OSError, ValueError):  # no path at all
        absolute, there = file, False
    if absolute in seen:
        circle = " -> ".join(item.name for item in (*seen[seen.index(absolute) :], file))
        raise SpecError(
            layer.name,
            "base",
            f"the files are based on each other ({circle})",
            "Break the circle",
            code="circular-reference",
        )
    if not there:
        raise SpecError(layer.name, "base", f"there is no file {file}", _similar(file), code="missing-file")
    layers, folders = _read(file, seen)
    return [*layers, layer], [folder.resolve(), *folders]


def _similar(file: Path) -> str:
    near = get_close_matches(file.name, [item.name for item in file.parent.glob("*.y*ml")], n=1)
    return f"Did you mean {file.parent / near[0]}?" if near else "Check the path"


class _Loader(yaml.SafeLoader):
    """Safe YAML whose keys are text and are given once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            wrong = None
            if not isinstance(key, str):
                wrong = f"the key {what(key)}, not text; put it in quotes"
            elif key in seen:
                wrong = f"the key {key} is given twice"
            if wrong:
                raise yaml.constructor.ConstructorError(None, None, wrong, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# Dates are text here, and what needs an explicit tag (!!binary, !!set, ...) has no place in a configuration.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)


class _CommandLineLoader(_Loader):
    """Reads 1e-3 as a number, as every shell user expects."""


_CommandLineLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def _syntax(error: Exception) -> tuple[str, str]:
    """Problem and remedy of text that is no YAML."""
    said = " ".join(str(part) for part in (getattr(error, "context", None), getattr(error, "problem", None)) if part)
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"not valid YAML{where}: {said or str(error).splitlines()[0]}", "Correct that line" if mark else "Correct it"


def _index(place: Any, key: str, found: Keys) -> str | int:
    """The key or number under which an override finds its place."""
    if isinstance(place, dict):
        return key
    if isinstance(place, list) and key.isdecimal() and int(key) < len(place):
        return int(key)
    wrong, remedy = f"{path(found)} holds no keys: {what(place)}", f"Set {path(found)} as a whole"
    if isinstance(place, list):
        wrong = f"{path(found)} is a list of {len(place)}, it has no item {key}"
        remedy = f"Use 0 to {len(place) - 1}" if place else remedy
    raise option_error(path((*found, key)), wrong, remedy, code="invalid-override")


def _plain(name: str, keys: Keys, value: Any, around: tuple[int, ...]) -> Any:
    """A copy out of fresh dicts and lists; refuses what no configuration can mean."""
    if id(value) in around:
        raise SpecError(name, path(keys), "the value contains itself", "Write it out", code="circular-reference")
    if isinstance(value, float) and not math.isfinite(value):
        raise SpecError(name, path(keys), f"{value} is not a finite number", "Give a finite one", code="not-finite")
    around = (*around, id(value))
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SpecError(
                    name, path(keys), f"the key {what(key)}, not text", "Use text as keys", code="wrong-type"
                )
        return {key: _plain(name, (*keys, key), item, around) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(name, (*keys, index), item, around) for index, item in enumerate(value)]
    return value
