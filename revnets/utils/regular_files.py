"""Checks for regular files: reading a pipe or a device may never end."""

from __future__ import annotations

import errno
import os
import stat
from typing import IO


def require_regular(path: str | os.PathLike[str], follow_links: bool = True) -> None:
    """Check that a path is a regular file or missing, before it is opened.

    Args:
        path: Path of the file.
        follow_links: Whether a link to a regular file is allowed.

    Raises:
        OSError: If it is a directory, a pipe or a device. Its `filename` is the path.
    """
    try:
        mode = os.stat(path, follow_symlinks=follow_links).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise _not_regular(path)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a regular file for reading.

    Args:
        path: Path of the file.

    Raises:
        OSError: If it is missing, a directory, a pipe or a device. Its `filename` is the path.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_regular(path)
    return file


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """Read a small regular file.

    Args:
        path: Path of the file.
        most: Largest allowed size in bytes.

    Raises:
        OSError: If it is larger, missing or not a regular file. Its `filename` is the path.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", os.fspath(path))
    return content


def _not_regular(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", os.fspath(path))
