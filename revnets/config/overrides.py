"""Overrides `key.path=value`: where they lead to, and their values, which are YAML."""

from __future__ import annotations

from typing import Any

import yaml

from revnets.config import load_errors as errors
from revnets.config.errors import EXPONENT, ArgumentError, Keys, option_error, path, what
from revnets.config.loader import MAX_DEPTH, Loader

MAX_DIGITS = 20
"""Digits of a number of an item; Python refuses to read some thousands of them."""


def parse_override(text: str) -> tuple[str, Any]:
    """The key path and the value of one `key.path=value`.

    Raises:
        SpecError: it has another form, or its value is no YAML.
    """
    key_path, equals, value_text = text.partition("=")
    keys = [key.strip() for key in key_path.split(".")]
    if not equals or not all(keys):
        raise errors.invalid_override(text)
    return ".".join(keys), parse_value(value_text, key_path)


def split_keys(key_path: str) -> tuple[str, ...]:
    """The keys of a path.

    Raises:
        SpecError: they are nested too deep.
    """
    keys = tuple(key_path.split("."))
    if len(keys) > MAX_DEPTH:
        raise errors.invalid_override(key_path)
    return keys


def parse_value(text: str, key: str = "") -> Any:
    """A value of the command line: YAML, in which 1e-3 is a number.

    Args:
        key: names the value in error messages.

    Raises:
        SpecError: it is no YAML, or YAML would leave out a part of it: what follows ` #`, and line feeds.
    """
    try:
        return CommandLineLoader(text).get_single_data()
    except Exception as error:  # PyYAML raises more than YAMLError, such as KeyError for `!!bool x`
        raise errors.invalid_value(text, key, error) from None


def index_of(place: Any, key: str, found: Keys) -> str | int:
    """The key or number under which an override finds its place."""
    if isinstance(place, dict):
        return key
    if isinstance(place, list) and key.isdecimal() and len(key) < MAX_DIGITS and int(key) < len(place):
        return int(key)
    wrong, remedy = f"{path(found)} holds no keys: {what(place)}", f"Set {path(found)} as a whole"
    if isinstance(place, list):
        wrong = f"{path(found)} is a list of {len(place)}, it has no item {key}"
        remedy = f"Use 0 to {len(place) - 1}" if place else remedy
    raise option_error(path((*found, key)), wrong, remedy, code="invalid-override")


class CommandLineLoader(Loader):
    """Reads 1e-3 as a number, as every shell user expects, and refuses what YAML would drop from the text."""

    def scan_to_next_token(self) -> None:
        start = self.pointer
        super().scan_to_next_token()
        if "#" in self.buffer[start : self.pointer]:
            raise ArgumentError("YAML takes what follows # for a comment", code="invalid-syntax")

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        start, end, style = (getattr(self.peek_event(), name) for name in ("start_mark", "end_mark", "style"))
        node = super().compose_scalar_node(anchor)
        is_whole = self._depth == 1 and len(self.buffer.splitlines()) > 1
        if style not in ("|", ">") and (is_whole or start.line != end.line):
            raise ArgumentError("it has several lines, and a line feed is \\n in double quotes", code="invalid-syntax")
        return node


CommandLineLoader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
