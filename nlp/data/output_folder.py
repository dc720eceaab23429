"""Folders that `prepare-mt` may replace or remove: data sets of its own, with no other files, one process at a time."""

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
    """Hold a lock beside a file or folder while it is written.

    Raises:
        TranslationError: another process holds it.
        OSError: the lock cannot be written.
    """
    make_folder(path.parent)
    try:
        with FileLock(path.with_name(f".{path.name}.lock")):
            yield
    except LockedError as error:
        raise TranslationError(
            f"{path}: {error.owner or 'another process'} is writing it. Wait for its end, or give another path",
            code="output-in-use",
        ) from None


def check_replaceable(output: Path, inputs: Iterable[Path] = ()) -> None:
    """Check that replacing a folder deletes neither an input nor other files.

    Args:
        output: the folder; it may be missing.
        inputs: files and folders that are read.

    Raises:
        TranslationError: it is not a data set of `prepare-mt`, it contains other files, or it contains an input or the
            working directory.
    """
    place = Path(os.path.realpath(output))
    if not place.name:
        raise TranslationError(f"{output}: the root cannot be replaced. Give another --output", code="file-exists")
    check_inputs(output, inputs)
    if not place.exists():
        return
    if not place.is_dir():
        raise TranslationError(f"{output}: a file, not a folder. Give another --output", code="file-exists")
    entries = sorted(place.iterdir())
    foreign = next((path.name for path in entries if path.is_dir() or not _OWN.fullmatch(path.name)), None)
    if foreign is None and entries and not _is_note(place):
        foreign = entries[0].name
    if foreign is not None:
        raise TranslationError(
            f"{output}: contains {foreign}, which prepare-mt did not write, so the folder is not replaced. "
            "Give another --output",
            code="file-exists",
        )
    if Path.cwd().is_relative_to(place):
        raise TranslationError(
            f"{output}: contains the working directory. Change to another one first", code="conflicting-values"
        )


def check_inputs(folder: Path, inputs: Iterable[Path]) -> None:
    """Check that a folder to be replaced or removed contains no input.

    Raises:
        TranslationError: it contains one.
    """
    for path in inputs:
        if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
            raise TranslationError(
                f"{folder}: contains the input {path}. Give another --output", code="conflicting-values"
            )


def _is_note(folder: Path) -> bool:
    try:
        note = read_note(folder)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(note, dict) and {"key", "facts", "inputs"} <= note.keys()
