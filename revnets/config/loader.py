"""Bounded YAML loader: base files and validation as a frozen pydantic model, with one-line errors."""

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
"""Overrides as texts `key.path=value`, or as a mapping of key paths to values."""

MAX_BYTES, MAX_BASES = 1_000_000, 32
"""Largest size of a file, and largest number of chained base files."""


MAX_NODES, MAX_DEPTH = 100_000, 64
"""Largest number of values in a file (each use of an alias counts), and largest nesting."""


class Strict(BaseModel):
    """Base class of configuration models: frozen, without unknown keys, implicit conversions or infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Layer(dict[str, Any]):
    """The keys of one file or mapping, and its name in errors."""

    def __init__(self, name: str, data: Any):
        super().__init__(checked_value(name, (), data))
        self.name = name


class Layers:
    """The merged content of a file, its base files and overrides. Records the file of each value.

    Args:
        layers: Layers in ascending priority.
        folders: Directories searched for modules of components.

    Attributes:
        data: The merged data.
        name: Name of the file with the highest priority.
    """

    def __init__(self, layers: Sequence[Layer], folders: Sequence[Path] = ()):
        self.folders = folders
        self.data: dict[str, Any] = {}
        self.name = layers[-1].name
        self._origins: dict[Any, Any] = {}  # tree of keys; the entry `None` of a branch is its file
        for layer in layers:
            self._merge(self.data, layer, (), layer.name)

    def _merge(self, data: dict[str, Any], over: dict[str, Any], place: Keys, name: str) -> None:
        """Merge `over` into `data`: mappings key by key unless their `type` changes. Other values are replaced."""
        for key, value in over.items():
            old = data.get(key)
            if isinstance(old, dict) and isinstance(value, dict) and value.get("type") in (None, old.get("type")):
                self._merge(old, value, (*place, key), name)
            else:
                self.put(data, key, value, (*place, key), name)

    def put(self, place: Any, key: Any, value: Any, keys: Keys, name: str) -> None:
        """Set an item of a mapping or list of `data`, which is at `keys`, and record the file that sets it."""
        place[key] = value
        branch = self._origins
        for outer in keys[:-1]:
            branch = branch.setdefault(outer, {})
        branch[keys[-1]] = {None: name}

    def copy(self) -> Layers:
        """Return a deep copy."""
        return copy.deepcopy(self)

    def origin(self, keys: Keys) -> str:
        """Return the name of the file that sets a value, or of the file in which it is missing."""
        branch, found = self._origins, self.name
        for key in keys:
            branch = branch.get(key, {})
            found = branch.get(None, found)
        return found

    def check(self, model: type[M], **context: Any) -> M:
        """Validate the merged data and return an instance of the model.

        Args:
            model: Pydantic model.
            context: Context of its validators, in addition to `folders`.

        Raises:
            SpecError: If a value is invalid. Its `source` is the file that sets the value.
        """
        try:
            return validate(TypeAdapter(model), self.data, {"folders": (*self.folders, Path.cwd()), **context})
        except ValidationError as error:
            keys, text, hint, code = explain(error, self.data, model)
            raise SpecError(self.origin(keys), path(keys), text, hint, code) from None


def load(model: type[M], source: Source, overrides: Overrides = ()) -> M:
    """Read a YAML file or mapping, apply its base files and overrides, and validate it.

    Args:
        model: Pydantic model.
        source: Path of a YAML file, or a mapping of the same form.
        overrides: Texts `key.path=value`, applied last. List items have numbers, as in `levels.2.depth=6`.

    Returns:
        An instance of the model.

    Raises:
        SpecError: If the file, a base file, an override or a value is invalid.
    """
    from revnets.config.overrides import apply_overrides  # imports this module

    layers = read_layers(source)
    apply_overrides(layers, overrides)
    return layers.check(model)


def read_layers(source: Source, name: str = "dict") -> Layers:
    """Return the merged content of a YAML file and its base files, without validating the values.

    Args:
        source: Path of a YAML file, or a mapping of the same form.
        name: Name of a mapping in errors.

    Raises:
        SpecError: If a file is missing or is not valid YAML.
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
        raise problem(f"there is no home directory {show(user)}", f"Write the full path, or ./{text}")
    return expanded


UserPath = Annotated[str, AfterValidator(_home)]
"""A path in a configuration, in which `~` is the home directory."""


def validate(adapter: TypeAdapter[T], data: Any, context: Mapping[str, Any] | None = None) -> T:
    """Validate data by the strict rules of pydantic for JSON: tuples may be lists, and paths and enums may be text.

    Data that JSON cannot represent, such as a mapping that contains classes, is validated by the rules for Python.

    Args:
        adapter: Type adapter of pydantic.
        data: Data to validate.
        context: Context of validators.

    Returns:
        The validated data.

    Raises:
        pydantic.ValidationError: If the data is invalid.
    """
    try:
        text = json.dumps(data)
    except (TypeError, ValueError):
        return adapter.validate_python(data, context=context)
    return adapter.validate_json(text, context=context)


def _read(file: Path, seen: tuple[Path, ...]) -> tuple[list[Layer], list[Path]]:
    """Return the layers of a file, base files first, and their directories."""
    name = str(file)
    try:
        if not (file.is_file() or file.is_dir()) and file.exists():
            raise ArgumentError("this is a pipe or a device", code="not-a-file")  # reading it might never end
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
    except (OSError, ValueError, RuntimeError):  # not a valid path, or circular links
        absolute, there = file, False
    if absolute in seen:
        raise errors.circular_base(layer.name, (*seen[seen.index(absolute) :], file))
    if not there:
        raise errors.missing_base(layer.name, file)
    if len(seen) == MAX_BASES:
        raise errors.too_large(layer.name, "base", f"more than {MAX_BASES} chained base files")
    layers, folders = _read(file, seen)
    return [*layers, layer], [folder.resolve(), *folders]


_UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that neither a path nor a UTF-8 file can contain."""


def checked_value(name: str, keys: Keys, value: Any) -> Any:
    """Return a copy of new dicts and lists. Reject values that no configuration can contain, and too many of them."""
    count = 0

    def copied(keys: Keys, value: Any, around: tuple[int, ...]) -> Any:
        nonlocal count
        count += 1
        if id(value) in around:
            raise SpecError(name, path(keys), "the value contains itself", "Remove the cycle", "circular-reference")
        try:
            _check_bounds(count, len(around) + 1)
        except ArgumentError as error:
            raise errors.too_large(name, path(keys[:1]), str(error)) from None
        if isinstance(value, float) and not math.isfinite(value):
            hint = "Give a finite number"
            raise SpecError(name, path(keys), f"{value} is not a finite number", hint, code="not-finite")
        if isinstance(value, int) and value.bit_length() > 256:
            raise SpecError(name, path(keys), f"{show(value)} is too large", "Give less", code="out-of-range")
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


class Loader(yaml.SafeLoader):
    """Safe YAML loader with bounds: keys must be text and unique, and numbers decimal or hexadecimal."""

    def __init__(self, text: str):
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._nodes, self._depth = self._nodes + 1, self._depth + 1
        if self._depth > MAX_DEPTH:
            text = f"brackets are nested too deeply, in more than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(None, None, text, self.peek_event().start_mark)
        _check_bounds(self._nodes, self._depth)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_document(self, node: yaml.Node) -> Any:
        _measure(node, (), {})
        return super().construct_document(node)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Construct a scalar. Reject text that does not match its explicit tag, as in `!!int 1:30`."""
        text, kind = super().construct_scalar(node), node.tag.rpartition(":")[2]
        if kind in ("bool", "int", "float", "null"):
            plain = self.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
            if plain != kind and (plain, kind) != ("int", "float"):
                raise yaml.constructor.ConstructorError(None, None, f"{show(text)} is not !!{kind}", node.start_mark)
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
    """Check the number of values and the depth of their nesting.

    Raises:
        ArgumentError: If there are too many values, or they are nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ArgumentError(f"values are nested in more than {MAX_DEPTH} levels", code="too-large")
    if nodes > MAX_NODES:
        raise ArgumentError(f"more than {MAX_NODES:,} values, with aliases expanded", code="too-large")


def _measure(node: yaml.Node, keys: Keys, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return the number of values and the depth of a node with aliases expanded, without expanding them."""
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


# Dates are text, and types with an explicit tag (!!binary, !!set, ...) are rejected. Numbers with a surprising value in
# YAML 1.1 are text as well: 010 is 8 there, 1:30 is 90, 0b11 is 3 and 1_0 is 10.
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
