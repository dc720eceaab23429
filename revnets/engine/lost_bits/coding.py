"""Lost bits of a state: found in the forward, added to the reconstruction in backward."""

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
        """Is it not known yet how long it is?"""
        ...

    def compact(self) -> bool:
        """Cut to length what is longer than it has to be, which may wait for the device.

        Returns:
            Is it smaller than the state?
        """
        ...

    def decode(self, rebuilt: Tensor, state: Tensor, gamma: Tensor | float) -> None:
        """Add the difference to `rebuilt`, in place."""
        ...


def encode(
    past: Tensor, rebuilt: Tensor, state: Tensor, gamma: Tensor | float, defer: bool | None = None
) -> LostBits | None:
    """What must be kept to turn `rebuilt` into `past`. The memory of `rebuilt` is used up.

    Args:
        past: x_{t-m}.
        rebuilt: its reconstruction, of the same shape, dtype and strides.
        state: x_t, likewise.
        gamma: a number, or a tensor whose shape broadcasts to that of the state.
        defer: never wait for the device, leave the cut to `compact`; by default on everything but the CPU.

    Returns:
        None where the state itself takes no more.
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
    """The coder in Triton, where there is one for the device and dtype."""
    if past.device.type != "cuda" or past.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return working_kernels(past.device)


@cache
def working_kernels(device: torch.device) -> type[BlockFields] | None:
    """The coder in Triton, if its kernels can be built and run on a device; otherwise None, with one warning.

    Triton builds a launcher with a C compiler at the first launch, and knows no GPU below compute capability 7.0.
    """
    try:
        from revnets.engine.lost_bits.kernels import BlockFields  # a second of imports
    except ImportError:
        return None
    try:
        with without_transforms():
            past = torch.ones(1, device=device)
            BlockFields.encode(past, past.clone(), past, 0.5).decode(past.clone(), past, 0.5)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:  # a compiler and a driver have errors of many kinds
        reason = str(error).strip().partition("\n")[0]
        text = f"lost bits are coded without Triton on {device}, which takes more bytes: its kernels fail with"
        warnings.warn(f"{text} {type(error).__name__}: {reason}", stacklevel=2)
        return None
    return BlockFields


@contextmanager
def assumed(gamma: float) -> Generator[None]:
    """Let fake tensors through, which have no values to look at: lost bits have the length usual at this |gamma|.

    Tensors on the meta device always pass, with the length usual at 0.5.
    """
    token = _assumed.set(gamma)
    try:
        yield
    finally:
        _assumed.reset(token)


_PADDING = 5
"""Half a word of fields and half a byte of signs."""


@dataclass(slots=True)
class _Assumed:
    """As many bytes as usual."""

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
