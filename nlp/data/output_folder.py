"""Checks before an output directory is replaced: only data sets written by `prepare-mt`, by one process at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from revnets.utils.atomic_files import make_folder
from revnets.utils.file_lock import FileLock, LockedError

from .errors import TranslationError
from .resumable_steps import read_note

_OWN = re.compile(
    r"prepared\.json|preprocess\.log|codes|sentencepiece\.model|dict\.\w+\.txt|test\.raw\.\w+|(train|valid|test)\.\w+-\w+\.\w+\.(bin|idx)"
)


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Hold a lock file next to a file or directory while it is written.

    Raises:
        TranslationError: If another process holds the lock.
        OSError: If the lock file cannot be written.
    """
    make_folder(path.parent)
    try:
        with FileLock(path.with_name(f".{path.name}.lock")):
            yield
    except LockedError as error:
        raise TranslationError(
            f"{path}: {error.owner or 'another process'} is writing it. Wait until it ends, or choose another path",
            code="output-in-use",
        ) from None


def check_replaceable(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that replacing a directory would delete nothing but a data set of `prepare-mt`.

    Args:
        output: Directory to replace; it may be missing.
        inputs: Files and directories that are read.

    Raises:
        TranslationError: If it is not such a data set, or if it contains other files, an input or the working
            directory.
    """
    place = Path(os.path.realpath(output))
    if not place.name:
        raise TranslationError(f"{output}: the root directory. Choose another --output", code="file-exists")
    check_inputs(output, inputs)
    if not place.exists():
        return
    if not place.is_dir():
        raise TranslationError(f"{output}: a file, not a directory. Choose another --output", code="file-exists")
    entries = sorted(place.iterdir())
    foreign = next((path.name for path in entries if path.is_dir() or not _OWN.fullmatch(path.name)), None)
    if foreign is None and entries and not _is_note(place):
        foreign = entries[0].name
    if foreign is not None:
        raise TranslationError(
            f"{output}: contains {foreign}, which prepare-mt did not write, so it is not replaced. Choose another "
            "--output",
            code="file-exists",
        )
    if Path.cwd().is_relative_to(place):
        raise TranslationError(
            f"{output}: contains the working directory. Change to another directory first", code="conflicting-values"
        )


def check_inputs(folder: Path, inputs: Iterable[Path]) -> None:
    """Check that a directory to be replaced or removed contains no input.

    Args:
        folder: Directory to check.
        inputs: Files and directories that are read.

    Raises:
        TranslationError: If it contains an input.
    """
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise TranslationError(
                f"{folder}: contains the input {path}. Choose another --output", code="conflicting-values"
            )


def _is_note(folder: Path) -> bool:
    try:
        note = read_note(folder)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(note, dict) and {"key", "facts", "inputs"} <= note.keys()
