"""Copies between a device and host memory that run beside the computation.

An accelerator copies on a stream of its own, from and to pinned memory. Two rules keep its memory right without
`record_stream`, which would let blocks return late and at random times:

- The copying stream starts behind what the computation has queued so far, so what it reads is there, and what it
  writes is free.
- A `Transfer` holds all tensors that take part until the stream of the computation waits for its end, and makes it wait
  if nothing else does before it is freed. So no block is used again while a copy still reads or writes it.

The CPU has no second memory: its "host" memory is a plain copy, which `is_host_allocation` lets a counter of bytes tell
from the rest.
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
    """A buffer of `size` bytes in host memory."""
    _now.is_allocating = True
    try:
        with transferring():
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
    finally:
        _now.is_allocating = False


def is_host_allocation() -> bool:
    """Is the storage that this thread allocates now one of host memory?"""
    return getattr(_now, "is_allocating", False)


def is_transferring() -> bool:
    """Does this thread run operations for a copy over the link, which are no work of the device?"""
    return getattr(_now, "is_transferring", False)


@contextmanager
def transferring() -> Generator[None]:
    """Let `is_transferring` be true in the body."""
    _now.is_transferring = True
    try:
        yield
    finally:
        _now.is_transferring = False


def has_streams(device: torch.device) -> bool:
    """Does the device copy from and to pinned memory beside its computation?"""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "current_stream")


@cache
def _copying_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


class Transfer:
    """Copies that are on their way.

    Args:
        device: whose memory is one side of each copy.
        pairs: (destination, source), all of one size; those on the device belong to the current stream.
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
        """Let the present stream go on behind the copies, and let go of the tensors. The host does not wait."""
        if self._backend is not None and self._pairs:
            self._computing.wait_event(self._over)  # whose memory the tensors are
            self._backend.current_stream(self._computing.device).wait_event(self._over)
        self._pairs = ()

    def __del__(self) -> None:
        if self._backend is not None and self._pairs:
            self._computing.wait_event(self._over)
