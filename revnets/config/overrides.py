"""Overrides `key.path=value`: parsing of their keys and of their values, which are YAML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from revnets.config import load_errors as errors
from revnets.config.errors import EXPONENT, ArgumentError, Keys, option_error, path, what
from revnets.config.loader import MAX_DEPTH, Layers, Loader, Overrides, checked_value

MAX_DIGITS = 20
"""Largest number of digits of a list index. Python refuses to parse several thousand digits."""


def apply_overrides(layers: Layers, overrides: Overrides) -> None:
    """Apply overrides in order.

    Args:
        layers: The data, changed in place.
        overrides: Texts `key.path=value`, or values by key path.

    Raises:
        SpecError: If an override is invalid.
    """
    changes = overrides.items() if isinstance(overrides, Mapping) else map(parse_override, overrides)
    for key_path, value in changes:
        set_value(layers, key_path, value)


def set_value(layers: Layers, key_path: str, value: Any) -> None:
    """Set the value at a key path such as `levels.2.depth`, and add missing keys."""
    name, keys = "command line", split_keys(key_path)
    place: Any = layers.data
    found: Keys = ()
    for key in keys[:-1]:
        index = index_of(place, key, found)
        found = (*found, index)
        if isinstance(place, dict) and index not in place:
            layers.put(place, index, {}, found, name)
        place = place[index]
    index = index_of(place, keys[-1], found)
    layers.put(place, index, checked_value(name, keys, value), (*found, index), name)


def parse_override(text: str) -> tuple[str, Any]:
    """Split one `key.path=value` into key path and value.

    Args:
        text: The override.

    Returns:
        The key path and the parsed value.

    Raises:
        SpecError: If the form is different, or the value is not valid YAML.
    """
    key_path, equals, value_text = text.partition("=")
    keys = [key.strip() for key in key_path.split(".")]
    if not equals or not all(keys):
        raise errors.invalid_override(text)
    return ".".join(keys), parse_value(value_text, key_path)


def split_keys(key_path: str) -> tuple[str, ...]:
    """Split a key path into keys.

    Raises:
        SpecError: If there are too many keys.
    """
    keys = tuple(key_path.split("."))
    if len(keys) > MAX_DEPTH:
        raise errors.invalid_override(key_path)
    return keys


def parse_value(text: str, key: str = "") -> Any:
    """Parse a value of the command line: YAML in which 1e-3 is a number.

    Args:
        text: The value.
        key: Name of the value in errors.

    Raises:
        SpecError: If it is not valid YAML, or YAML would drop a part of it: what follows ` #`, or line feeds.
    """
    try:
        return CommandLineLoader(text).get_single_data()
    except Exception as error:  # PyYAML raises more than YAMLError, such as KeyError for `!!bool x`
        raise errors.invalid_value(text, key, error) from None


def index_of(place: Any, key: str, found: Keys) -> str | int:
    """Return the key or list index that a key of an override refers to.

    Args:
        place: Mapping or list that the previous keys lead to.
        key: Next key of the override.
        found: Previous keys, for errors.

    Raises:
        SpecError: If `place` has no such item.
    """
    if isinstance(place, dict):
        return key
    if isinstance(place, list) and key.isdecimal() and len(key) < MAX_DIGITS and int(key) < len(place):
        return int(key)
    wrong, remedy = f"{path(found)} has no keys: {what(place)}", f"Set {path(found)} as a whole"
    if isinstance(place, list):
        wrong = f"{path(found)} is a list of length {len(place)} and has no item {key}"
        remedy = f"Use 0 to {len(place) - 1}" if place else remedy
    raise option_error(path((*found, key)), wrong, remedy, code="invalid-override")


class CommandLineLoader(Loader):
    """Reads 1e-3 as a number, as users of a shell expect, and rejects text of which YAML would drop a part."""

    def scan_to_next_token(self) -> None:
        start = self.pointer
        super().scan_to_next_token()
        if "#" in self.buffer[start : self.pointer]:
            raise ArgumentError("YAML treats what follows # as a comment", code="invalid-syntax")

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        start, end, style = (getattr(self.peek_event(), name) for name in ("start_mark", "end_mark", "style"))
        node = super().compose_scalar_node(anchor)
        is_whole = self._depth == 1 and len(self.buffer.splitlines()) > 1
        if style not in ("|", ">") and (is_whole or start.line != end.line):
            text = "it has several lines; write a line feed as \\n in double quotes"
            raise ArgumentError(text, code="invalid-syntax")
        return node


CommandLineLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
