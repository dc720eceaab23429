"""Atomic files and directories: written completely or not at all, also if the process is killed."""

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
"""Suffix of a file that is being written. A leftover file with this suffix comes from a killed process."""

_NAME = re.compile(
    rf"\.(?P<name>.+?)\.(?P<pid>\d+)(?:@(?P<host>[^@/.]*))?(?P<old>\.old)?{re.escape(TEMPORARY)}", re.DOTALL
)
"""Name of a temporary file: its target, the process that writes it, and whether it is the previous target."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
DAY = 24 * 3600


@contextmanager
def replacing(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Write a file under a temporary name in the same directory and rename it once it is on disk.

    If the body raises, an existing file stays unchanged. Temporary files that killed processes have left for the same
    path are removed. The directory is created if it is missing.

    Args:
        path: Path of the file.
        mode: Mode of `open`. Text is UTF-8.

    Yields:
        The open temporary file.

    Raises:
        OSError: If the file cannot be written. Its `filename` is the path.
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
            temporary.unlink(missing_ok=True)  # no longer exists after the rename


def append(path: Path, content: bytes, sync: bool = False) -> None:
    """Append to a file. The file and its directory are created if they are missing.

    Args:
        path: Path of the file.
        content: Bytes to append.
        sync: Whether to wait until the content is on disk.

    Raises:
        OSError: If the file cannot be written. Its `filename` is the path.
    """
    with _naming(path, path):
        make_folder(path.parent)
        with open(path, "ab") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())


def link(source: Path, target: Path) -> None:
    """Create a hard link, and replace an existing target. On file systems without links, the file is copied.

    Args:
        source: Existing file.
        target: Path of the link.

    Raises:
        OSError: If the target cannot be written. Its `filename` is the target.
    """
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
    """Write a directory under a temporary name and rename it after the body. An existing directory is replaced.

    If the body raises, an existing directory stays unchanged. Temporary directories that killed processes have left
    for the same path are removed.

    Args:
        path: Path of the directory.

    Yields:
        The temporary directory to fill.

    Raises:
        OSError: If the directory cannot be written. Its `filename` is the path unless the system names another file.
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
            if path.exists():  # a rename cannot replace a directory that is not empty
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
    """Return the temporary path under which this process writes a file or directory."""
    owner = Owner.current()
    return path.with_name(f".{path.name}.{owner.pid}@{owner.host}{TEMPORARY}")


def make_folder(path: Path) -> None:
    """Create a directory and its parents, also on disk. An existing directory stays unchanged."""
    missing = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        missing.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync(folder.parent)


def remove_leftovers(folder: Path, name: str | None = None, exclusive: bool = False) -> None:
    """Delete temporary files that killed processes have left in a directory.

    A live process holds a lock on what it writes, so its files stay. On file systems without locks, only processes on
    this machine are detected.

    Args:
        folder: The directory.
        name: Name of the file or directory that was being written, or None for all.
        exclusive: Whether only processes on this machine write here. If False, temporary files of other machines are
            kept for a day, because not every network file system shows their locks.
    """
    try:
        found = sorted(os.listdir(folder))
    except OSError:  # it does not exist, or is not accessible
        return
    for entry in found:
        match = _NAME.fullmatch(entry)
        if match is None or (name is not None and match["name"] != name):
            continue
        path, target = folder / entry, folder / match["name"]
        if _is_in_use(path, match["host"], int(match["pid"]), exclusive):
            continue
        with suppress(OSError):
            if match["old"] and not os.path.lexists(target):  # killed between both renames: restore the old one
                os.rename(path, target)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_in_use(path: Path, host: str | None, pid: int, exclusive: bool) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_NONBLOCK)
    except OSError:  # it no longer exists, or belongs to another user
        return True
    try:
        age = time.time() - os.fstat(descriptor).st_ctime
        if try_lock(descriptor) is False:
            return True
    finally:
        os.close(descriptor)
    if host is None:  # written by an earlier version, which used no locks
        return False
    owner = Owner(pid, host)
    if owner.host == Owner.current().host:
        return owner.may_have_written(path)
    return not exclusive and age < DAY


def _take_name(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    with suppress(OSError):  # not every system can open directories; the rename has happened in any case
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Set the target as `filename` of system errors, also of those that the writer of torch hides."""
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
