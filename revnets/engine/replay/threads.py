"""Thread-local state of a pass, and locks for the modules of a cell, generators and global settings.

A program with a single thread takes no lock. Locks are not stored in modules, which are copied and pickled.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from revnets.engine.torch_internals import buffers_of


class _Nesting(threading.local):
    inside = False
    replaying = False


_nesting = _Nesting()


@contextmanager
def inside(replaying: bool = False) -> Generator[None]:
    """Mark the body as the call of a cell whose saved tensors are handles, or as its replay."""
    before = _nesting.inside, _nesting.replaying
    _nesting.inside, _nesting.replaying = True, replaying
    try:
        yield
    finally:
        _nesting.inside, _nesting.replaying = before


def is_inside() -> bool:
    """Whether this thread runs a cell whose saved tensors are handles (Rule 7)."""
    return _nesting.inside


def is_replaying() -> bool:
    """Return True while this thread replays a cell in backward.

    A replay calls the modules of the cell a second time. Modules with side effects in their forward pass, such as a
    call counter, can skip them in a replay. What the cell computes and saves must not depend on the result.

    Example:
        >>> if not revnets.is_replaying():
        ...     self.calls += 1
    """
    return _nesting.replaying


_of_modules: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_of_devices: dict[torch.device, threading.RLock] = {}
_of_process = threading.RLock()


def is_alone() -> bool:
    """Whether the main thread is the only one. Python does not count the threads of autograd, one per device."""
    return threading.active_count() == 1 and threading.get_ident() == threading.main_thread().ident


@contextmanager
def process_lock() -> Generator[None]:
    """Hold the lock for the default generator and for global settings of the process."""
    with _of_process:
        yield


@contextmanager
def exclusive(modules: Sequence[nn.Module], devices: Iterable[torch.device]) -> Generator[None]:
    """Hold the locks of a cell, of its modules with buffers, which other cells may share, and of generators.

    Args:
        modules: Modules of the cell, which is the first one.
        devices: Accelerators whose generators the cell may use.
    """
    if is_alone():
        yield
        return
    places = {modules[0], *(module for module in modules if buffers_of(module))}
    # The same order in all threads prevents a deadlock.
    locks = [_of_modules.setdefault(place, threading.RLock()) for place in sorted(places, key=id)]
    locks += [_of_devices.setdefault(device, threading.RLock()) for device in sorted(devices, key=str)]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield


def _renew() -> None:
    """Create new locks in a forked child, because the threads that may hold the old ones do not exist there."""
    global _of_process
    _of_process = threading.RLock()
    _of_modules.clear()
    _of_devices.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
