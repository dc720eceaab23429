"""Where a thread is in a pass, and what it takes for itself: the modules of a cell, a generator, a global switch.

A program of one thread takes no lock here. Locks are not part of modules, which are copied and pickled.
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
    """Let the body run a cell whose saved tensors are handles, or replay it."""
    before = _nesting.inside, _nesting.replaying
    _nesting.inside, _nesting.replaying = True, replaying
    try:
        yield
    finally:
        _nesting.inside, _nesting.replaying = before


def is_inside() -> bool:
    """Is this thread in a cell whose saved tensors are handles? (Rule 7)"""
    return _nesting.inside


def is_replaying() -> bool:
    """Does this thread replay a cell for its backward?

    A replay calls the modules of the cell a second time. Those that do more in their forward than to compute, such as
    to count calls or to append a loss to a list, ask here and leave it out:

        if not revnets.is_replaying():
            self.calls += 1

    What the cell computes and saves must not depend on the answer.
    """
    return _nesting.replaying


_of_modules: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_of_devices: dict[torch.device, threading.RLock] = {}
_of_process = threading.RLock()


def is_alone() -> bool:
    """Is the main thread the only one? Those of autograd, one a device, are not counted among Python's threads."""
    return threading.active_count() == 1 and threading.get_ident() == threading.main_thread().ident


@contextmanager
def process_lock() -> Generator[None]:
    """Exclude all other threads that ask for it: from the default generator, or from a switch of the process."""
    with _of_process:
        yield


@contextmanager
def exclusive(modules: Sequence[nn.Module], devices: Iterable[torch.device]) -> Generator[None]:
    """Exclude other threads from a cell, from modules with buffers that it shares with others, and from generators.

    Args:
        modules: of the cell, which is the first of them.
        devices: accelerators whose generators the cell may use.
    """
    if is_alone():
        yield
        return
    places = {modules[0], *(module for module in modules if buffers_of(module))}
    # In one order for all threads, so that no two of them wait for each other.
    locks = [_of_modules.setdefault(place, threading.RLock()) for place in sorted(places, key=id)]
    locks += [_of_devices.setdefault(device, threading.RLock()) for device in sorted(devices, key=str)]
    with ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        yield


def _renew() -> None:
    """A forked child has the locks of its parent, but not the threads that hold them."""
    global _of_process
    _of_process = threading.RLock()
    _of_modules.clear()
    _of_devices.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
