"""YAML loader: base files, overrides and validation as a frozen pydantic model, with one-line errors."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from revnets.config import load_errors as errors
from revnets.config.bounded_yaml import Loader, check_bounds
from revnets.config.errors import ArgumentError, Keys, SpecError, explain, path, problem, show, what

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")
Source = str | Path | Mapping[str, Any]
Overrides = Sequence[str] | Mapping[str, Any]
"""Overrides as texts `key.path=value`, or as a mapping of key paths to values."""

MAX_BYTES, MAX_BASES = 1_000_000, 32
"""Largest size of a file, and largest number of chained base files."""


class Strict(BaseModel):
    """Base class of configuration models: frozen, without unknown keys, implicit conversions or infinite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Layer(dict[str, Any]):
    """The keys of one file or mapping, and its name in errors."""

    def __init__(self, name: str, data: Any):
        super().__init__(_plain(name, (), data))
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
                self._set(data, key, value, (*place, key), name)

    def _set(self, place: Any, key: Any, value: Any, keys: Keys, name: str) -> None:
        place[key] = value
        branch = self._origins
        for outer in keys[:-1]:
            branch = branch.setdefault(outer, {})
        branch[keys[-1]] = {None: name}

    def copy(self) -> Layers:
        """Return a deep copy."""
        return copy.deepcopy(self)

    def apply(self, overrides: Overrides) -> None:
        """Apply overrides in order.

        Raises:
            SpecError: If an override is invalid.
        """
        if isinstance(overrides, Mapping):
            for place, value in overrides.items():
                self.set(place, value)
        else:
            for text in overrides:
                self.override(text)

    def override(self, text: str) -> None:
        """Apply one override `key.path=value`."""
        from revnets.config.overrides import parse_override  # imports this module

        self.set(*parse_override(text))

    def set(self, key_path: str, value: Any) -> None:
        """Set the value at a key path such as `levels.2.depth`, and add missing keys."""
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
        """Return the name of the file that sets a value, or of the file in which it is missing."""
        branch, found = self._origins, self.name
        for key in keys:
            branch = branch.get(key, {})
            found = branch.get(None, found)
        return found

    def check(self, model: type[M], **context: Any) -> M:
        """Validate the merged data.

        Args:
            model: Pydantic model.
            context: Context of its validators, in addition to `folders`.

        Returns:
            An instance of the model.

        Raises:
            SpecError: If a value is invalid. Its `source` is the file that sets the value.
        """
        try:
            return validate(TypeAdapter(model), self.data, {"folders": (*self.folders, Path.cwd()), **context})
        except ValidationError as error:
            keys, problem, remedy, code = explain(error, self.data, model)
            raise SpecError(self.origin(keys), path(keys), problem, remedy, code) from None


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
    config = read_layers(source)
    config.apply(overrides)
    return config.check(model)


def read_layers(source: Source, name: str = "dict") -> Layers:
    """Read a YAML file and its base files without validating the values.

    Args:
        source: Path of a YAML file, or a mapping of the same form.
        name: Name of a mapping in errors.

    Returns:
        The merged files.

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


def _plain(name: str, keys: Keys, value: Any) -> Any:
    """Return a copy of new dicts and lists. Reject values that no configuration can contain, and too many of them."""
    count = 0

    def copied(keys: Keys, value: Any, around: tuple[int, ...]) -> Any:
        nonlocal count
        count += 1
        if id(value) in around:
            raise SpecError(name, path(keys), "the value contains itself", "Remove the cycle", "circular-reference")
        try:
            check_bounds(count, len(around) + 1)
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
