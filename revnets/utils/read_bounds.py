"""Bounds on the content of a file: the size of its data, its nesting and its repetitions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

MAX_DEPTH = 64
"""Largest nesting of containers."""

FREE_BYTES, FACTOR = 2**24, 16
"""Tensors may have `FREE_BYTES` plus `FACTOR` times the size of the file. Tied weights are stored once but count for
each of their names, and views that repeat a value (`Tensor.expand`) count in full."""

MAX_NAME = 1000
"""Largest length of a key in characters."""

FREE_NODES = 10**6
"""Number of values that repeated containers may add. A container counts at each place where it occurs."""

_KEYS = (str, int, float, bool, bytes, type(None))


class RejectedError(Exception):
    """Raised for a file that contains more than plain data, or declares more data than it contains.

    Attributes:
        code: Kind of error, a key of `revnets.utils.checkpoint_io.TEXTS`.
        message: What is wrong, or empty for the default message.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code, self.message = code, message


class Allowance:
    """Memory that reading a file may still allocate.

    Args:
        size: Size of the file in bytes.
    """

    def __init__(self, size: int):
        self.left = FREE_BYTES + FACTOR * size

    def take(self, count: int) -> None:
        """Subtract `count` bytes.

        Raises:
            RejectedError: If fewer bytes are left.
        """
        self.left -= count
        if self.left < 0:
            raise RejectedError(code="unsafe-file", message="rejected: it declares much more data than it contains")


def is_size(value: Any) -> bool:
    """Return True for an int that can be a size."""
    return type(value) is int and 0 <= value < 2**62


def is_shape(value: Any) -> bool:
    """Return True for a tuple or list of sizes that is not too long."""
    return type(value) in (tuple, list, torch.Size) and len(value) <= MAX_DEPTH and all(map(is_size, value))


def checked_key(key: Any) -> Any:
    """Return a key of a mapping if it is plain or a short tuple of plain values.

    The hash of nested tuples that contain another one twice takes exponential time.

    Raises:
        TypeError: If the key is anything else.
    """
    items = key if type(key) in (tuple, torch.Size) else (key,)
    if len(items) > 8 or not all(type(item) in _KEYS for item in items):
        raise TypeError("a key is neither text nor a number")
    return key


def require_bounded(content: Any) -> None:
    """Check that content can be traversed quickly: no cycles, no deep nesting, and few repeated containers.

    Raises:
        RejectedError: If it cannot. The message contains the reason.
    """
    sizes: dict[int, int] = {}  # number of values in each finished container, nested ones included
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
            raise RejectedError(code="unsafe-file", message="rejected: it contains itself")
        elif id(value) not in sizes:
            open_ones.add(id(value))
            if len(open_ones) > MAX_DEPTH:
                raise RejectedError(code="unsafe-file", message=f"rejected: it has more than {MAX_DEPTH} nested levels")
            stack.append((value, True))
            stack.extend((part, False) for part in parts)
    if sizes.get(id(content), 0) > FREE_NODES + 2 * len(sizes):
        raise RejectedError(code="unsafe-file", message="rejected: it contains the same values millions of times")


def _parts(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):
        if any(isinstance(key, str) and (len(key) > MAX_NAME or not key.isprintable()) for key in value):
            raise RejectedError(
                code="damaged-file", message="damaged: the name of an entry cannot be printed on one line"
            )
        return [*value.keys(), *value.values()]
    if isinstance(value, argparse.Namespace):
        return list(vars(value).values())
    return list(value) if isinstance(value, (list, tuple)) else None


def _weight(part: Any, sizes: dict[int, int]) -> int:
    if isinstance(part, (str, bytes)):
        return 1 + len(part) // 64
    return sizes.get(id(part), 1)
