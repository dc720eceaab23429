"""Bounds on the content of a file: the data it may declare, its depth of nesting, its repetitions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

MAX_DEPTH = 64
"""How deeply containers may be nested."""

FREE_BYTES, FACTOR = 2**24, 16
"""Tensors may have as many bytes as `FREE_BYTES` and `FACTOR` times the file. Tied weights are in the file once, but
count for each of their names; so do views that repeat a value (`Tensor.expand`)."""

MAX_NAME = 1000
"""Length of a key in characters."""

FREE_NODES = 10**6
"""Containers that occur in several places count in each of them; they may add this many values to those in the file."""

_KEYS = (str, int, float, bool, bytes, type(None))


class RejectedError(Exception):
    """A file that holds more than plain data, or declares more data than it has."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message


class Allowance:
    """What reading one file may still allocate.

    Args:
        size: of the file, in bytes.
    """

    def __init__(self, size: int):
        self.left = FREE_BYTES + FACTOR * size

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise RejectedError(code="unsafe-file", message="refused, it declares much more data than it holds")


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**62


def is_shape(value: Any) -> bool:
    return type(value) in (tuple, list, torch.Size) and len(value) <= MAX_DEPTH and all(map(is_size, value))


def checked_key(key: Any) -> Any:
    """A key of a mapping. The hash of nested tuples takes exponential time where they contain each other twice."""
    items = key if type(key) in (tuple, torch.Size) else (key,)
    if len(items) > 8 or not all(type(item) in _KEYS for item in items):
        raise TypeError("a key that is neither text nor a number")
    return key


def require_bounded(content: Any) -> None:
    """Refuse content that takes too long to traverse: cycles, deep nesting and repeated containers.

    Raises:
        RejectedError: names the reason.
    """
    sizes: dict[int, int] = {}  # of the containers that are done, with all that they contain
    open_ones: set[int] = set()
    stack = [(content, False)]
    while stack:
        value, is_done = stack.pop()
        parts = _parts(value)
        if parts is None:
            continue
        if is_done:
            open_ones.discard(id(value))
            sizes[id(value)] = 1 + sum(_weight(part, sizes) for part in parts)
        elif id(value) in open_ones:
            raise RejectedError(code="unsafe-file", message="refused, it contains itself")
        elif id(value) not in sizes:
            open_ones.add(id(value))
            if len(open_ones) > MAX_DEPTH:
                raise RejectedError(code="unsafe-file", message=f"refused, it is nested more than {MAX_DEPTH} deep")
            stack.append((value, True))
            stack.extend((part, False) for part in parts)
    if sizes.get(id(content), 0) > FREE_NODES + 2 * len(sizes):
        raise RejectedError(code="unsafe-file", message="refused, it contains the same values millions of times")


def _parts(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):
        if any(isinstance(key, str) and (len(key) > MAX_NAME or not key.isprintable()) for key in value):
            raise RejectedError(
                code="damaged-file", message="damaged, the name of an entry cannot be printed on a line"
            )
        return [*value.keys(), *value.values()]
    if isinstance(value, argparse.Namespace):
        return list(vars(value).values())
    return list(value) if isinstance(value, (list, tuple)) else None


def _weight(part: Any, sizes: dict[int, int]) -> int:
    if isinstance(part, (str, bytes)):
        return 1 + len(part) // 64
    return sizes.get(id(part), 1)
