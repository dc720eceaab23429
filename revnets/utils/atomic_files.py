"""Files that are either there in full or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TEMPORARY = ".partial"
"""Suffix of a file that is being written. One that is found later was left by a process that was killed."""


@contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file under a temporary name in its own folder; it takes its name once it is on the disk.

    If the body raises, the file that had the name before stays as it was.

    Raises:
        OSError: no space, no permission and the like.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _take_name(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # after a success it has its name and is not found here


def link(source: Path, target: Path) -> None:
    """Give a file a second name, replacing whatever had it. Where the file system has no links, it is copied."""
    temporary = _temporary(target)
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temporary)
        except OSError:
            with open(source, "rb") as original, open(temporary, "wb") as copy:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())
        _take_name(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str = "*") -> None:
    """Delete what killed processes have left half-written, of all files and folders or of those called `name`."""
    for path in folder.glob(f".{name}.*{TEMPORARY}"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")


def _take_name(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    with suppress(OSError):  # not every system lets a folder be opened; the rename is done in any case
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes its name when the body is done, in place of one that had it.

    If the body raises, the folder that had the name before stays as it was.

    Raises:
        OSError: no space, no permission and the like.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _temporary(path), path.with_name(f".{path.name}.{os.getpid()}.old{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        if path.exists():  # no system replaces a folder that is not empty
            os.rename(path, old)
        _take_name(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
