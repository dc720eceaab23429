"""Checks of webdataset's shard names in brace notation, `train-{0000..0099}.tar`, before they are expanded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from revnets.utils.regular_files import require_regular
from vision.errors import run_error

MAX_SHARDS = 10**6
"""Limit of shards, more than any data set has."""

LONGEST = 2**14
"""Most characters of a split."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?$")
_LETTERS = 100  # upper bound of a range of letters


def check_shards(root: Path, split: str) -> None:
    """Check a split and the description files, which webdataset does not check.

    Raises:
        revnets.SpecError: If the braces of a split expand to too many names, or a description is a pipe or a device.
    """
    if count_names(split) > MAX_SHARDS:
        problem = f"{split:.80} expands to more than {MAX_SHARDS:,} shards"
        raise run_error("data", problem, "Give smaller numbers in braces", code="out-of-range")
    check_files(root, ("_info.json", "info.json"))


def check_files(root: Path, names: Iterable[str]) -> None:
    """Require regular files, because webdataset would wait for a pipe and read a device without end.

    Raises:
        revnets.SpecError: If a file is a directory, a pipe or a device.
    """
    for name in names:
        try:
            require_regular(root / name)
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
            raise run_error("data.root", problem, "Remove it", code="not-a-file") from None


def count_names(text: str) -> int:
    """An upper bound on the number of names that braces expand to. Counting stops above `MAX_SHARDS`."""
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
