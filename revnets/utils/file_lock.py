"""File locks that are released when their process ends, and the identity of the process that holds a lock."""

from __future__ import annotations

import errno
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, NamedTuple

from revnets.utils.regular_files import require_regular

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Owner(NamedTuple):
    """A process on a machine."""

    pid: int
    host: str

    @classmethod
    def current(cls) -> Owner:
        """Return this process."""
        return cls(os.getpid(), platform.node().partition(".")[0][:32])

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def may_have_written(self, path: Path) -> bool:
        """Return True if the process runs on this machine and already ran when the file was last changed.

        A process that started later only has the same process id as the one that wrote the file.
        """
        if self.host != Owner.current().host:
            return False
        try:
            os.kill(self.pid, 0)
        except PermissionError:
            pass  # it exists and belongs to another user
        except (OSError, OverflowError):
            return False
        try:
            return _start(self.pid) <= path.stat().st_ctime
        except (OSError, ValueError, IndexError):  # no /proc
            return True


def _start(pid: int) -> float:
    """Return the start time of a process on this machine as a timestamp."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def try_lock(descriptor: int) -> bool | None:
    """Lock an open file or directory without waiting.

    The lock lasts until the last copy of the descriptor is closed, at the latest when the process and its forks end.

    Args:
        descriptor: Descriptor of the open file or directory.

    Returns:
        True if it is now locked, False if it was already locked, None if the system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES) else None
    return True


class LockedError(Exception):
    """Raised if another process holds a lock.

    Attributes:
        path: Path of the lock file.
        owner: The process that holds the lock, or None if the file does not contain it.
    """

    def __init__(self, path: Path, owner: Owner | None):
        super().__init__(f"{path} is locked by {owner or 'another process'}")
        self.path, self.owner = path, owner

    def __reduce__(self) -> tuple[type[LockedError], tuple[Path, Owner | None]]:  # processes send errors as pickles
        return LockedError, (self.path, self.owner)


class FileLock:
    """A lock file that contains the process that holds the lock.

    The lock is released when the process ends, even if it is killed. Forks do not inherit it. `release` removes the
    file. Use it as a context manager, or call `acquire` and `release`.

    Args:
        path: Path of the lock file.

    Attributes:
        path: Path of the lock file.
        is_reliable: False if the file system has no locks, so that only live processes on this machine are detected.
    """

    def __init__(self, path: Path):
        self.path, self.is_reliable = path, True
        self._file: IO[bytes] | None = None

    def acquire(self) -> None:
        """Acquire the lock without waiting.

        Raises:
            LockedError: If another process, or another lock object of this process, holds it.
            OSError: If the file cannot be written.
        """
        while self._file is None:
            if os.path.lexists(self.path):
                require_regular(self.path, follow_links=False)  # the target of a link would be emptied
            file = open(self.path, "a+b")  # noqa: SIM115  (it is closed in `release`)
            try:
                locked = try_lock(file.fileno())
                owner = None if locked else _read_owner(file)
                in_use = owner not in (None, Owner.current()) and owner.may_have_written(self.path)
                if locked is False or (locked is None and in_use):
                    raise LockedError(self.path, owner)
                if _has_name(file, self.path):  # otherwise its last owner has just removed it
                    file.truncate(0)
                    file.write("{} {}\n".format(*Owner.current()).encode())
                    file.flush()
                    self._file, self.is_reliable = file, locked is not None
                    _held.add(self)
            finally:
                if self._file is None:
                    file.close()

    def release(self) -> None:
        """Release the lock if it is held, and remove its file."""
        if self._file is not None:
            with suppress(OSError):
                if _has_name(self._file, self.path):
                    self.path.unlink()
            self.abandon()

    def abandon(self) -> None:
        """Close the lock file without removing it, as forks do."""
        if self._file is not None:
            _held.discard(self)
            with suppress(OSError):
                self._file.close()
            self._file = None

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _read_owner(file: IO[bytes]) -> Owner | None:
    file.seek(0)
    pid, _, host = file.read(256).decode(errors="replace").strip().partition(" ")
    return Owner(int(pid), host) if pid.isascii() and pid.isdecimal() and len(pid) < 20 and host.isprintable() else None


def _has_name(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


_held: set[FileLock] = set()


def _abandon_all() -> None:
    for lock in list(_held):
        lock.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
