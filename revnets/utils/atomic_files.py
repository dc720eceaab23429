"""Files that are either there in full or not at all, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from revnets.utils.file_lock import Owner, try_lock

TEMPORARY = ".partial"
"""Suffix of a file that is being written. One that is found later was left by a process that was killed."""

_NAME = re.compile(
    rf"\.(?P<name>.+?)\.(?P<pid>\d+)(?:@(?P<host>[^@/.]*))?(?P<old>\.old)?{re.escape(TEMPORARY)}", re.DOTALL
)
"""Name of a temporary file: for what, by which process, and whether it is what had the name before."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
DAY = 24 * 3600


@contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file under a temporary name in its own folder; it takes its name once it is on the disk.

    If the body raises, the file that had the name before stays as it was. What killed processes have left of the same
    name is removed.

    Raises:
        OSError: no space, no permission and the like; its `filename` is the path.
    """
    temporary = temporary_path(path)
    with _naming(path, temporary):
        make_folder(path.parent)
        remove_leftovers(path.parent, path.name)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                try_lock(file.fileno())
                yield file
                file.flush()
                os.fsync(file.fileno())
            _take_name(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # after a success it has its name and is not found here


def append(path: Path, content: bytes, sync: bool = False) -> None:
    """Add to a file, which is made with its folder if it is not there, and have all of it on the disk if asked to.

    Raises:
        OSError: no space, no permission and the like; its `filename` is the path.
    """
    with _naming(path, path):
        make_folder(path.parent)
        with open(path, "ab") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())


def link(source: Path, target: Path) -> None:
    """Give a file a second name, replacing whatever had it. Where the file system has no links, it is copied."""
    temporary = temporary_path(target)
    with _naming(target, temporary):
        remove_leftovers(target.parent, target.name)
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


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it takes its name when the body is done, in place of one that had it.

    If it fails, the folder that had the name before stays as it was. What killed processes have left of the same
    name is removed.

    Raises:
        OSError: no space, no permission and the like; its `filename` is the path if the system names none.
    """
    temporary = temporary_path(path)
    old = temporary.with_name(temporary.name.removesuffix(TEMPORARY) + f".old{TEMPORARY}")
    with _naming(path, temporary):
        make_folder(path.parent)
        remove_leftovers(path.parent, path.name)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY) if os.name == "posix" else None
        try:
            if lock is not None:
                try_lock(lock)
            yield temporary
            for file in (*temporary.rglob("*"), temporary):
                _sync(file)
            if path.exists():  # no system replaces a folder that is not empty
                os.rename(path, old)
            try:
                _take_name(temporary, path)
            except BaseException:
                if old.exists() and not path.exists():
                    os.rename(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        finally:
            if lock is not None:
                os.close(lock)
            shutil.rmtree(temporary, ignore_errors=True)


def temporary_path(path: Path) -> Path:
    """The name under which this process writes a file or folder until it is complete."""
    owner = Owner.current()
    return path.with_name(f".{path.name}.{owner.pid}@{owner.host}{TEMPORARY}")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, on the disk too; one that is there is left as it is."""
    missing = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        missing.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def remove_leftovers(folder: Path, name: str | None = None, exclusive: bool = False) -> None:
    """Delete what killed processes have left half-written in a folder.

    What a live process is writing stays: it holds a lock on it. Where the file system has no locks, the process must
    run on this machine to be noticed.

    Args:
        name: of the file or folder that was to be written; None for all.
        exclusive: no process of another machine writes here; otherwise what such processes have written is left alone
            for a day, since not every network file system shows their locks.
    """
    try:
        found = sorted(os.listdir(folder))
    except OSError:  # it does not exist, or is none of ours
        return
    for entry in found:
        match = _NAME.fullmatch(entry)
        if match is None or (name is not None and match["name"] != name):
            continue
        path, target = folder / entry, folder / match["name"]
        if _is_in_use(path, match["host"], int(match["pid"]), exclusive):
            continue
        with suppress(OSError):
            if match["old"] and not os.path.lexists(target):  # killed between the two renames: nothing else is left
                os.rename(path, target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_in_use(path: Path, host: str | None, pid: int, exclusive: bool) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_NONBLOCK)
    except OSError:  # it has gone, or is of another user
        return True
    try:
        age = time.time() - os.fstat(descriptor).st_ctime
        if try_lock(descriptor) is False:
            return True
    finally:
        os.close(descriptor)
    if host is None:  # of an earlier version, which took no locks
        return False
    owner = Owner(pid, host)
    if owner.host == Owner.current().host:
        return owner.may_have_written(path)
    return not exclusive and age < DAY


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
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let errors of the system name the file that was to be written, also where torch's writer hides them."""
    try:
        yield
    except OSError as error:
        if error.filename == str(temporary) or (error.filename is None and error.errno in _FULL):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    except RuntimeError as error:
        cause = error.__context__
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in _FULL):
            cause = cause.__context__
        if cause is None or type(error) is not RuntimeError:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
