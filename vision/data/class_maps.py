"""Class map files, which number the classes of a data set as in timm: one name per line, or a pickled dict."""

from __future__ import annotations

import os
import pickletools
from collections import Counter

from timm.data.readers.class_map import load_class_map

from revnets.utils.regular_files import open_regular
from vision.errors import comparable, first_line, run_error

MAX_BYTES = 2**26
"""Size limit of a class map, more than the names of a million classes need."""

_PLAIN = frozenset(
    {"PROTO", "FRAME", "STOP", "MARK", "DICT", "EMPTY_DICT", "SETITEM", "SETITEMS"}
    | {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"}
    | {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
)
"""Opcodes of a pickled dict of names and numbers. Tuples are excluded: hashing nested ones takes exponential time."""


def read_class_map(file: str, root: str = "") -> dict[str, int]:
    """Read the numbers of the classes by name.

    Args:
        file: A `.txt` with one class name per line, numbered from 0, or a pickle as timm reads it.
        root: Directory that is searched if the file is not in the working directory.

    Raises:
        revnets.SpecError: If the file does not exist, is too large, or is not a class map.
    """
    place = file if os.path.exists(file) else os.path.join(root, file)
    try:
        with open_regular(place) as opened:
            size = os.fstat(opened.fileno()).st_size
            data = opened.read(size) if size <= MAX_BYTES else None
    except OSError as error:
        problem = f"{place} cannot be read ({error.strerror or first_line(error)})"
        raise run_error("data.class_map", problem, "Check the path", code="missing-file") from None
    if data is None:
        problem = f"{place} is larger than {MAX_BYTES:,} bytes"
        raise run_error("data.class_map", problem, "Give a class map", code="too-large")
    if file.lower().endswith(".txt"):
        return _numbers(data, place)
    try:
        if file.lower().endswith(".pkl"):
            _require_plain(data)
        return load_class_map(file, root)
    except Exception as error:  # readers of pickles raise errors of any type
        problem = f"{place} is not a class map ({first_line(error)})"
        raise run_error("data.class_map", problem, "Give a .txt with one name per line", code="wrong-format") from None


def _numbers(data: bytes, place: str) -> dict[str, int]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise run_error("data.class_map", f"{place} is not UTF-8", "Convert it", code="invalid-encoding") from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").rstrip().split("\n")
    names = [comparable(line.strip()) for line in lines]
    for number, name in enumerate(names, 1):
        if not name and len(names) > 1:
            problem = f"line {number} of {place} is empty"
            raise run_error("data.class_map", problem, "Remove the line", code="invalid-syntax")
    if repeated := [name for name, times in Counter(names).items() if times > 1]:
        problem = f"{place} names {repeated[0]} twice"
        raise run_error("data.class_map", problem, "Name every class once", code="name-clash")
    return {name: number for number, name in enumerate(names)}


def _require_plain(data: bytes) -> None:
    """Refuse a pickle that holds more than names and numbers, or whose memo is longer than the file."""
    for code, argument, _ in pickletools.genops(data):
        is_far = code.name.endswith("PUT") and (argument or 0) > len(data)  # the memo is a list of that length
        if is_far or code.name not in _PLAIN:
            raise ValueError("it contains more than class names and numbers")
