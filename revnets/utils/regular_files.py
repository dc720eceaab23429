"""Files that may be opened: reading a pipe or a device may never end, and writing to it is no file."""

from __future__ import annotations

import errno
import os
import stat
from typing import IO


def require_regular(path: str | os.PathLike[str], follow_links: bool = True) -> None:
    """Refuse what is neither a regular file nor missing, before it is opened.

    Args:
        follow_links: is a link to a regular file one, too?

    Raises:
        OSError: it is a folder, a pipe or a device; its `filename` is the path.
    """
    try:
        mode = os.stat(path, follow_symlinks=follow_links).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise _not_regular(path)


def open_regular(path: str | os.PathLike[str]) -> IO[bytes]:
    """Open a file for reading, unless it is a folder, a pipe or a device.

    Raises:
        OSError: it is one of these, or there is no such file; its `filename` is the path.
    """
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_regular(path)
    return file


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """What a small file holds.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: it is larger, no regular file, or missing; its `filename` is the path.
    """
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", os.fspath(path))
    return content


def _not_regular(path: str | os.PathLike[str]) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", os.fspath(path))
