"""Autocast regions: recorded, entered again and left."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch


class Autocast(NamedTuple):
    """Autocast of one device type. It is thread-local, and backward may run in another thread."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache: bool

    @classmethod
    def now(cls, device_type: str) -> Autocast:
        return cls(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )


@contextmanager
def outside_of_autocast() -> Generator[Callable[[], ExitStack]]:
    """Leave the caller's autocast regions; yields what enters one like them.

    Backward runs outside, as in a training loop, and weights that were cast for the forward are dropped in time.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = ["cpu", *([accelerator.type] if accelerator else [])]
    found = [Autocast.now(kind) for kind in kinds if torch.is_autocast_enabled(kind)]
    depth = torch.autocast_increment_nesting()

    def region() -> ExitStack:
        stack = ExitStack()
        for kind, enabled, dtype, cache in found:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cache))
        return stack

    for _ in range(depth):
        torch.autocast_decrement_nesting()
    for autocast in found:
        torch.set_autocast_enabled(autocast.device_type, False)
    torch.clear_autocast_cache()
    try:
        yield region
    finally:
        for autocast in found:
            torch.set_autocast_enabled(autocast.device_type, True)
        for _ in range(depth - 1):
            torch.autocast_increment_nesting()
