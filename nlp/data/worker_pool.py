"""Ordered parallel map over blocks of text in worker processes.

Worker processes import this module, so it imports nothing that imports torch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from types import ModuleType
from typing import TypeVar

from .errors import TranslationError

T = TypeVar("T")
R = TypeVar("R")

FEW = 8
"""Up to this many items are processed in the calling process: starting workers would take longer."""

MOST = 16
"""Default limit of worker processes: beyond it, reading and writing limit the speed."""


def blocks(items: Iterable[T], size: int = 4096) -> Iterator[list[T]]:
    """Yield consecutive items in lists of `size`; the last list may be shorter."""
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def default_workers() -> int:
    """Return the number of cores available to this process, at most `MOST`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Make processes spawned here import only the module of their function.

    They would also import the main module. That of the command `revnets` imports torch, which takes every process
    seconds and several hundred megabytes.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def ordered(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Apply a function to items in several processes and yield the results in order.

    Only a few items per worker are in flight, so `items` may be endless.

    Args:
        function: A function defined in an importable module, not in the main module.
        items: Inputs of the function.
        workers: Number of processes.

    Yields:
        The result for each item.

    Raises:
        TranslationError: If a process was killed.
    """
    iterator = iter(items)
    first = list(islice(iterator, FEW + 1))
    items = chain(first, iterator)
    if workers == 1 or len(first) <= FEW:
        yield from map(function, items)
        return
    pending: deque[Future[R]] = deque()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for item in items:
                with _without_main_module():
                    pending.append(pool.submit(function, item))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise TranslationError(
                f"one of {workers} worker processes was killed, possibly out of memory. Use fewer (--workers)",
                code="process-lost",
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
