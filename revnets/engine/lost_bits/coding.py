"""Lost bits of a state: encoded in the forward pass, added to the reconstruction in backward."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import Field, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from revnets.engine.lost_bits.fields import Fields
from revnets.engine.lost_bits.rounding import expected_bytes, is_dense, layout_of
from revnets.engine.torch_internals import without_transforms

if TYPE_CHECKING:
    from revnets.engine.lost_bits.kernels import BlockFields

_assumed: ContextVar[float | None] = ContextVar("assumed gamma", default=None)


class LostBits(Protocol):
    """Difference between a state and its reconstruction; a dataclass that holds tensors."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def nbytes(self) -> int: ...

    @property
    def is_pending(self) -> bool:
        """Whether the length is not known yet."""
        ...

    def compact(self) -> bool:
        """Truncate buffers to the length in use, which may wait for the device.

        Returns:
            True if the lost bits are smaller than the state.
        """
        ...

    def decode(self, rebuilt: Tensor, state: Tensor, gamma: Tensor | float) -> None:
        """Add the difference to `rebuilt`, in place."""
        ...


def encode(
    past: Tensor, rebuilt: Tensor, state: Tensor, gamma: Tensor | float, defer: bool | None = None
) -> LostBits | None:
    """Encode the difference between a state and its reconstruction. Overwrites `rebuilt`.

    Args:
        past: x_{t-m}.
        rebuilt: Its reconstruction, of the same shape, dtype and strides.
        state: x_t, of the same shape, dtype and strides.
        gamma: A number, or a tensor whose shape broadcasts to that of the state.
        defer: Do not wait for the device, and leave the truncation to `compact`; by default on all devices but the CPU.

    Returns:
        The lost bits, or None if they are no smaller than the state.
    """
    assumed_gamma = _assumed.get()
    if assumed_gamma is None and past.is_meta:
        assumed_gamma = 0.5
    lost: LostBits | None = None
    if assumed_gamma is not None:
        lost = _Assumed.encode(past, assumed_gamma)
    elif is_dense(past):
        if defer if defer is not None else past.device.type != "cpu":
            if (kernels := kernels_for(past)) is not None:
                return kernels.encode(past, rebuilt, state, gamma)
            from revnets.engine.lost_bits.tiers import Tiers

            return Tiers.encode(past, rebuilt)
        lost = Fields.encode(past, rebuilt, state, gamma)
    return lost if lost is not None and lost.nbytes < past.nbytes else None


def kernels_for(past: Tensor) -> type[BlockFields] | None:
    """Return the Triton coder, or None if there is none for the device and dtype."""
    if past.device.type != "cuda" or past.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return working_kernels(past.device)


@cache
def working_kernels(device: torch.device) -> type[BlockFields] | None:
    """Return the Triton coder if its kernels compile and run on the device; otherwise None, with one warning.

    Triton needs a C compiler for the first launch, and compute capability 7.0 or higher.
    """
    try:
        from revnets.engine.lost_bits.kernels import BlockFields  # takes a second to import
    except ImportError:
        return None
    try:
        with without_transforms():
            past = torch.ones(1, device=device)
            BlockFields.encode(past, past.clone(), past, 0.5).decode(past.clone(), past, 0.5)
    except torch.OutOfMemoryError:
        raise  # not a failure of the kernels
    except Exception as error:  # compilers and drivers raise many kinds of errors
        reason = str(error).strip().partition("\n")[0]
        text = f"lost bits are coded without Triton on {device}, which takes more memory: its kernels fail with"
        warnings.warn(f"{text} {type(error).__name__}: {reason}", stacklevel=2)
        return None
    return BlockFields


@contextmanager
def assumed(gamma: float) -> Generator[None]:
    """Give the lost bits of fake tensors, which have no values, their expected length at this |gamma|.

    Tensors on the meta device always use the expected length, by default at |gamma| = 0.5.
    """
    token = _assumed.set(gamma)
    try:
        yield
    finally:
        _assumed.reset(token)


_PADDING = 5
"""Bytes: on average, half a word of fields and half a byte of signs are unused."""


@dataclass(slots=True)
class _Assumed:
    """A buffer of the expected length, without content."""

    content: Tensor

    @classmethod
    def encode(cls, past: Tensor, gamma: float) -> _Assumed:
        numbers = past.numel() * (2 if past.is_complex() else 1)
        length = int(numbers * expected_bytes(gamma, layout_of(past.dtype).size)) + _PADDING
        return cls(past.new_empty(length, dtype=torch.uint8))

    @property
    def nbytes(self) -> int:
        return self.content.nbytes

    @property
    def is_pending(self) -> bool:
        return False

    def compact(self) -> bool:
        return True

    def decode(self, rebuilt: Tensor, state: Tensor, gamma: Tensor | float) -> None:
        pass
