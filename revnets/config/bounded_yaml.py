"""YAML loader for untrusted text: safe types, bounded size, unique keys, and numbers without surprises."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from revnets.config.errors import ArgumentError, Keys, path, show, what

MAX_NODES, MAX_DEPTH = 100_000, 64
"""Largest number of values in a file (each use of an alias counts), and largest nesting."""


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
        check_bounds(self._nodes, self._depth)
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


def check_bounds(nodes: int, depth: int) -> None:
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
    check_bounds(*found)
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
