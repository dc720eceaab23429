"""From YAML text to a frozen pydantic model: base files, overrides, and one clear error for whatever is wrong."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from revnets.config import load_errors as errors
from revnets.config.errors import ArgumentError, Keys, SpecError, explain, path, problem, show, what

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Source = str | Path | Mapping[str, Any]
Overrides = Sequence[str] | Mapping[str, Any]
"""`key.path=value` as text, or key paths and their values."""

MAX_BYTES, MAX_NODES, MAX_DEPTH, MAX_BASES = 1_000_000, 100_000, 64, 32
"""Bounds of a file, of its values (aliases count as often as they are used), of their nesting, and of chained bases."""


class Strict(BaseModel):
    """Base of all configuration models: frozen, no unknown keys, no silent conversions, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Layer(dict[str, Any]):
    """The keys of one file (or dict), and the name under which its mistakes are reported."""

    def __init__(self, name: str, data: Any):
        super().__init__(_plain(name, (), data))
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
        self._origins: dict[Any, Any] = {}  # a tree of keys; the entry `None` of a branch is its origin
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
        branch = self._origins
        for outer in keys[:-1]:
            branch = branch.setdefault(outer, {})
        branch[keys[-1]] = {None: name}

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
        from revnets.config.overrides import parse_override  # which reads YAML as here

        self.set(*parse_override(text))

    def set(self, key_path: str, value: Any) -> None:
        """Replace the value at `key.path`, or add it."""
        from revnets.config.overrides import index_of, split_keys

        name, keys = "command line", split_keys(key_path)
        value = _plain(name, keys, value)
        place: Any = self.data
        found: Keys = ()
        for key in keys[:-1]:
            index = index_of(place, key, found)
            found = (*found, index)
            if isinstance(place, dict) and index not in place:
                self._set(place, index, {}, found, name)
            place = place[index]
        index = index_of(place, keys[-1], found)
        self._set(place, index, value, (*found, index), name)

    def origin(self, keys: Keys) -> str:
        """The file that a value came from; of a missing one, the file that it is missing in."""
        branch, found = self._origins, self.name
        for key in keys:
            branch = branch.get(key, {})
            found = branch.get(None, found)
        return found

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
    if not isinstance(source, (str, os.PathLike)):
        raise errors.no_keys(name, source)
    return Layers(*_read(Path(os.path.expanduser(source)), ()))


def _home(text: str) -> str:
    expanded = os.path.expanduser(text)
    user, slash, _ = expanded.partition("/")
    if user[:1] == "~" and slash and not os.path.exists(user):
        raise problem(f"{show(user)} is the home folder of no user", f"Write the path in full, or ./{text}")
    return expanded


UserPath = Annotated[str, AfterValidator(_home)]
"""A path in a configuration, in which `~` is the home folder."""


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
        if not (file.is_file() or file.is_dir()) and file.exists():
            raise ArgumentError("this is a pipe or a device", code="not-a-file")  # reading may never end
        if file.is_file() and file.stat().st_size > MAX_BYTES:
            raise ArgumentError(f"more than {MAX_BYTES:,} bytes", code="too-large")
        data = Loader(file.read_text(encoding="utf-8")).get_single_data()
    except Exception as error:  # PyYAML raises more than YAMLError, such as KeyError for `!!bool x`
        raise errors.unreadable(file, error) from None
    if not isinstance(data, dict):
        raise errors.no_keys(name, data)
    return _with_bases(Layer(name, data), file.parent, (*seen, file.resolve()))


def _with_bases(layer: Layer, folder: Path, seen: tuple[Path, ...]) -> tuple[list[Layer], list[Path]]:
    if "base" not in layer:
        return [layer], [folder.resolve()]
    base = layer.pop("base")
    if not isinstance(base, str):
        raise errors.no_base(layer.name, base)
    file = folder / os.path.expanduser(base)
    try:
        absolute, there = file.resolve(), file.exists()
    except (OSError, ValueError, RuntimeError):  # no path at all, or links in a circle
        absolute, there = file, False
    if absolute in seen:
        raise errors.circular_base(layer.name, (*seen[seen.index(absolute) :], file))
    if not there:
        raise errors.missing_base(layer.name, file)
    if len(seen) == MAX_BASES:
        raise errors.too_large(layer.name, "base", f"more than {MAX_BASES} files are based on each other")
    layers, folders = _read(file, seen)
    return [*layers, layer], [folder.resolve(), *folders]


class Loader(yaml.SafeLoader):
    """Safe YAML of bounded size whose keys are text and are given once, and whose numbers are decimal or 0x."""

    def __init__(self, text: str):
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._depth > MAX_DEPTH:
            text = f"brackets nested too deep, in more than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(None, None, text, self.peek_event().start_mark)
        _check_bounds(self._nodes, self._depth)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        _measure(node, (), {})
        return super().construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Refuses text that an explicit tag does not fit, as in `!!int 1:30`."""
        text, kind = super().construct_scalar(node), node.tag.rpartition(":")[2]
        if kind in ("bool", "int", "float", "null"):
            plain = self.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
            if plain != kind and (plain, kind) != ("int", "float"):
                raise yaml.constructor.ConstructorError(None, None, f"{show(text)} is no !!{kind}", node.start_mark)
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node in (key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"):
            key = self.construct_object(key_node, deep=True)
            is_text = isinstance(key, str)
            if not is_text or key in seen:
                wrong = f"{key} is given twice" if is_text else f"{what(key)}, not text; put it in quotes"
                raise yaml.constructor.ConstructorError(None, None, f"the key {wrong}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _check_bounds(nodes: int, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ArgumentError(f"values nested in more than {MAX_DEPTH} levels", code="too-large")
    if nodes > MAX_NODES:
        raise ArgumentError(f"more than {MAX_NODES:,} values, aliases written out", code="too-large")


def _measure(node: yaml.Node, keys: Keys, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Values in a node and its depth, with aliases and merge keys written out, before anything is."""
    if id(node) in known:
        if (found := known[id(node)]) is None:
            raise ArgumentError("the value contains itself", path(keys), "circular-reference")
        return found
    known[id(node)] = None
    parts: list[tuple[int, int]] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else "?"
            parts += [_measure(key, keys, known), _measure(value, (*keys, name), known)]
    elif isinstance(node, yaml.SequenceNode):
        parts = [_measure(item, (*keys, index), known) for index, item in enumerate(node.value)]
    known[id(node)] = found = 1 + sum(part[0] for part in parts), 1 + max((part[1] for part in parts), default=0)
    _check_bounds(*found)
    return found


# Dates are text here, and what needs an explicit tag (!!binary, !!set, ...) has no place in a configuration. So are
# numbers that YAML 1.1 reads in another way than people do: 010 is 8, 1:30 is 90, 0b11 is 3, 1_0 is 10.
_REPLACED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("timestamp", "int", "float"))
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_INT = r"[-+]?(0|[1-9][0-9]*|0x[0-9a-fA-F]+)$"
_FLOAT = r"([-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
for _tag, _pattern in (("int", _INT), ("float", _FLOAT)):
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list("-+.0123456789"))
for _tag in ("timestamp", "binary", "set", "omap", "pairs"):
    Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", yaml.SafeLoader.construct_undefined)


_UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that neither a path nor a file in UTF-8 can hold."""


def _plain(name: str, keys: Keys, value: Any) -> Any:
    """A copy out of fresh dicts and lists; refuses what no configuration can mean, and what is too large for one."""
    count = 0

    def copied(keys: Keys, value: Any, around: tuple[int, ...]) -> Any:
        nonlocal count
        count += 1
        if id(value) in around:
            raise SpecError(name, path(keys), "the value contains itself", "Write it out", code="circular-reference")
        try:
            _check_bounds(count, len(around) + 1)
        except ArgumentError as error:
            raise errors.too_large(name, path(keys[:1]), str(error)) from None
        if isinstance(value, float) and not math.isfinite(value):
            raise SpecError(name, path(keys), f"{value} is not a finite number", "Give a finite one", code="not-finite")
        if isinstance(value, int) and value.bit_length() > 256:
            raise SpecError(name, path(keys), f"{show(value)} is too large", "Give a smaller one", code="out-of-range")
        if isinstance(value, str) and keys != ("base",) and _UNUSABLE.search(value):
            raise errors.unusable_text(name, keys, value)
        around = (*around, id(value))
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise SpecError(name, path(keys), f"the key {what(key)}, not text", "Use text", "wrong-type")
                if _UNUSABLE.search(key):
                    raise errors.unusable_text(name, keys, key)
            return {key: copied((*keys, key), item, around) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [copied((*keys, index), item, around) for index, item in enumerate(value)]
        return value

    return copied(keys, value, ())
