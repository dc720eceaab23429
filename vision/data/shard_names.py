"""Names of shards of webdataset in braces, `train-{0000..0099}.tar`, counted before they are written out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from revnets.utils.regular_files import require_regular
from vision.errors import run_error

MAX_SHARDS = 10**6
"""More shards than any data set has."""

LONGEST = 2**14
"""Characters of a split."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?$")
_LETTERS = 100  # at most, from one letter to another


def check_shards(root: Path, split: str) -> None:
    """Check what webdataset would open unchecked.

    Raises:
        revnets.SpecError: the braces of a split expand to too many names, or a description is a pipe or a device.
    """
    if count_names(split) > MAX_SHARDS:
        problem = f"{split:.80} expands to more than {MAX_SHARDS:,} shards"
        raise run_error("data", problem, "Give smaller numbers in braces", code="out-of-range")
    check_files(root, ("_info.json", "info.json"))


def check_files(root: Path, names: Iterable[str]) -> None:
    """Check the files that webdataset would open: it waits for a pipe, and reads from a device without end.

    Raises:
        revnets.SpecError: one of them is a folder, a pipe or a device.
    """
    for name in names:
        try:
            require_regular(root / name)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
            raise run_error("data.root", problem, "Remove it", code="not-a-file") from None


def count_names(text: str) -> int:
    """An upper bound on the number of names that braces expand to; it does not go far beyond `MAX_SHARDS`."""
    count = 1 if len(text) <= LONGEST else MAX_SHARDS + 1
    while count <= MAX_SHARDS and (found := _BRACES.search(text)):
        count *= _choices(found[1])
        text = text[: found.start()] + text[found.end() :]
    return count


def _choices(inside: str) -> int:
    if found := _RANGE.match(inside):
        if any(len(number) > 18 for number in found.groups()):
            return MAX_SHARDS + 1
        return abs(int(found[2]) - int(found[1])) + 1
    return _LETTERS if ".." in inside else inside.count(",") + 1
