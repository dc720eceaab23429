"""Copies between a device and host memory that overlap with the computation.

An accelerator copies on a separate stream, from and to pinned memory. Two rules make this safe without `record_stream`,
which would free blocks late and at unpredictable times:

- The copy stream waits for the operations that the compute stream has queued so far, so its sources are written and its
  destinations are free.
- A `Transfer` holds its tensors until the compute stream waits for the end of the copies. If the transfer is freed
  first, it makes the compute stream wait. So no block is reused while a copy reads or writes it.

The CPU has no second memory: its "host" memory is a plain copy. `is_host_allocation` lets a memory tracker distinguish
it.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_now = threading.local()


def host_empty(size: int, pinned: bool) -> Tensor:
    """Return a buffer of `size` bytes in host memory."""
    _now.is_allocating = True
    try:
        with transferring():
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    finally:
        _now.is_allocating = False


def is_host_allocation() -> bool:
    """Whether the storage that this thread currently allocates is host memory."""
    return getattr(_now, "is_allocating", False)


def is_transferring() -> bool:
    """Whether this thread currently runs operations of a copy between device and host."""
    return getattr(_now, "is_transferring", False)


@contextmanager
def transferring() -> Generator[None]:
    """Make `is_transferring` return True in the body."""
    _now.is_transferring = True
    try:
        yield
    finally:
        _now.is_transferring = False


def has_streams(device: torch.device) -> bool:
    """Whether the device can copy from and to pinned memory while it computes."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "current_stream")


@cache
def _copying_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


class Transfer:
    """Copies in progress.

    Args:
        device: The device of either the source or the destination of each copy.
        pairs: (destination, source) of equal size; tensors on the device belong to the current stream.
    """

    def __init__(self, device: torch.device, pairs: Sequence[tuple[Tensor, Tensor]]):
        self._pairs = pairs
        self._backend: Any = torch.get_device_module(device) if has_streams(device) else None
        if self._backend is None:
            with transferring():
                for destination, source in pairs:
                    destination.copy_(source)
            return
        self._computing = self._backend.current_stream(device)
        copying = _copying_stream(device)
        copying.wait_stream(self._computing)
        with self._backend.stream(copying), transferring():
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        self._over = copying.record_event()

    def wait(self) -> None:
        """Make the current stream wait for the copies, and release the tensors. The host does not wait."""
        if self._backend is not None and self._pairs:
            self._computing.wait_event(self._over)  # the stream that owns the tensors
            self._backend.current_stream(self._computing.device).wait_event(self._over)
        self._pairs = ()

    def __del__(self) -> None:
        if self._backend is not None and self._pairs:
            self._computing.wait_event(self._over)
