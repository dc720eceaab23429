"""The bits that x_t = F_t + gamma * x_{t-m} rounds away, packed small, so that the inverse is exact.

At forward time both x_{t-m} and its reconstruction (x_t - F_t) / gamma are at hand. Their difference d, taken between
the bit patterns read as integers, is small: at gamma 0.5 half of all d are 0 and 97 % lie within +-7. Integer
subtraction wraps and is undone by integer addition, so every value comes back bit for bit: denormals, -0.0,
infinities and NaN payloads as well.

The differences are kept in tiers. Every element has a code of 4 bits; -8 among these says that the difference did
not fit and that the next entry of the 8-bit tier holds it; -128 there points to the 16-bit tier, and so on up to the
width of the state. Entries of a tier lie in the order of memory, so no index is kept.

A tier's length is known only after the elements have been looked at. On the CPU that costs nothing. On a GPU asking
for it would make the host wait, so there `encode` fills tiers of the greatest possible length, sends the counts home
without waiting, and `compact`, called some cells later when they have long arrived, cuts the tiers to length.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_INTEGER = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_TIERS = (torch.int8, torch.int16, torch.int32, torch.int64)
_assumed: ContextVar[float | None] = ContextVar("assumed gamma", default=None)


@dataclass(slots=True)
class LostBits:
    """Difference between a state and its reconstruction, in units in the last place."""

    nibbles: Tensor  # uint8: element i in the low half of byte i, element half + i in the high half
    tiers: list[Tensor]  # int8, int16, ... up to the width of the state
    counts: Tensor | None = None  # lengths of the tiers, on their way to the host
    arrived: torch.Event | None = None

    def compact(self) -> None:
        """Cut the tiers to length. Waits if the counts are not there yet."""
        if self.counts is None:
            return
        if self.arrived is not None:
            self.arrived.synchronize()
        lengths = self.counts.numpy().tolist()
        self.tiers = [tier[:length].clone() for tier, length in zip(self.tiers, lengths, strict=True)]
        self.counts = self.arrived = None

    @property
    def nbytes(self) -> int:
        return self.nibbles.nbytes + sum(tier.nbytes for tier in self.tiers)


def encode(state: Tensor, rebuilt: Tensor, defer: bool | None = None) -> LostBits:
    """What must be kept to turn `rebuilt` into `state`. The memory of `rebuilt` is used up.

    Args:
        state, rebuilt: dense, of one shape, floating dtype and strides.
        defer: never wait for the device, leave the cut to `compact`; by default on everything but the CPU.
    """
    difference = bits_of(rebuilt)
    torch.sub(bits_of(state), difference, out=difference)
    nibbles = difference.clamp(-8, 8).to(torch.int8)  # 8 and -8 have the same low half
    packed = _pack(nibbles)
    dtypes = _TIERS[: _TIERS.index(difference.dtype) + 1]
    gamma = _assumed.get()
    if gamma is None and state.is_meta:
        gamma = 0.5
    if gamma is not None:
        shares = expected_shares(gamma, len(dtypes))
        return LostBits(
            packed,
            [
                difference.new_empty(int(share * difference.numel()), dtype=dtype)
                for share, dtype in zip(shares, dtypes, strict=True)
            ],
        )
    if defer if defer is not None else state.device.type != "cpu":
        return _encode_deferred(difference, nibbles, packed, dtypes)
    left = difference.index_select(0, _places(nibbles.abs_(), 8))
    tiers: list[Tensor] = []
    for dtype in dtypes:
        code, escaped = _narrow(left, dtype)
        tiers.append(code)
        left = left[escaped] if escaped is not None else left
    return LostBits(packed, tiers)


def decode(rebuilt: Tensor, lost: LostBits) -> Tensor:
    """Turn `rebuilt`, in place, into the state that `encode` saw."""
    lost.compact()
    bits = bits_of(rebuilt)
    nibbles = _unpack(lost.nibbles, bits.numel())
    bits.add_(nibbles)
    if _assumed.get() is not None or rebuilt.is_meta:
        return rebuilt
    wide = lost.tiers[-1]
    for code in reversed(lost.tiers[:-1]):
        escaped = code == torch.iinfo(code.dtype).min
        wide = code.to(bits.dtype).masked_scatter_(escaped, wide.to(bits.dtype))
    if wide.numel():
        index = _places(nibbles, -8)
        bits.index_add_(0, index, wide.to(bits.dtype) + 8)  # the code -8 was added already
    return rebuilt


@contextmanager
def assumed(gamma: float) -> Generator[None]:
    """Let fake tensors through, which have no values to look at: tiers get the lengths usual at this |gamma|.

    Tensors on the meta device always pass, with the lengths usual at 0.5.
    """
    token = _assumed.set(gamma)
    try:
        yield
    finally:
        _assumed.reset(token)


def expected_shares(gamma: float, tiers: int = 3) -> list[float]:
    """Share of the elements that have an entry in each tier, as found at random initialisation and in training.

    A difference comes from rounding x_t, magnified by 1 / |gamma| and by how much x_t outweighs x_{t-m}; its tail
    falls like 1 / n: P(|d| > n) is near 1 / (8 |gamma| n).
    """
    return [min(1.0, 0.125 / (max(abs(gamma), 1e-9) * n)) for n in (7, 2**7 - 1, 2**15 - 1, 2**31 - 1)[:tiers]]


def _encode_deferred(difference: Tensor, nibbles: Tensor, packed: Tensor, dtypes: tuple[torch.dtype, ...]) -> LostBits:
    """As `encode`, by prefix sums: no operation here makes the host wait for the device."""
    left, mask = difference, nibbles.abs() == 8
    tiers: list[Tensor] = []
    counts: list[Tensor] = []
    for dtype in dtypes:
        count = mask.sum()
        left, mask = _to_front(left, mask), torch.arange(mask.numel(), device=mask.device) < count
        code, escaped = _narrow(left, dtype)
        tiers.append(code)
        counts.append(count)
        if escaped is not None:
            mask = mask & escaped
    home = torch.stack(counts).to("cpu", non_blocking=True)
    arrived = None
    if difference.device.type != "cpu":
        arrived = torch.Event(difference.device)
        arrived.record()
    return LostBits(packed, tiers, home, arrived)


def _places(codes: Tensor, code: int) -> Tensor:
    """Where a vector of int8 has this value. On the CPU NumPy finds it in a fifth of PyTorch's time."""
    if codes.device.type == "cpu":
        places = np.flatnonzero(codes.numpy() == code)
        return torch.from_numpy(places)  # pyright: ignore[reportUnknownMemberType]
    return (codes == code).nonzero().squeeze(1)


def _to_front(values: Tensor, mask: Tensor) -> Tensor:
    """The masked values moved to the front, in order; what lies behind them is of no meaning."""
    place = torch.where(mask, mask.cumsum(0) - 1, values.numel())
    front = values.new_zeros(values.numel() + 1)
    return front.scatter_(0, place, values)[:-1]


def _narrow(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Codes of a narrower dtype, and where they do not say all; the smallest code is the sign for that."""
    if dtype == values.dtype:
        return values, None
    code = values.to(dtype)
    lowest = torch.iinfo(dtype).min
    escaped = (code != values) | (code == lowest)
    return code.masked_fill_(escaped, lowest), escaped


def _pack(nibbles: Tensor) -> Tensor:
    """Two signed 4-bit numbers a byte. Halves are paired, not neighbours, so that all reads are contiguous."""
    half = (nibbles.numel() + 1) // 2
    packed = nibbles[:half].bitwise_and(15)
    packed[: nibbles.numel() - half].bitwise_or_(nibbles[half:].bitwise_left_shift(4))
    return packed


def _unpack(packed: Tensor, numel: int) -> Tensor:
    low = packed.bitwise_left_shift(4).bitwise_right_shift_(4)  # arithmetic shifts bring the sign back
    high = packed[: numel - packed.numel()].bitwise_right_shift(4)
    return torch.cat((low, high))


def bits_of(tensor: Tensor) -> Tensor:
    """The tensor's memory as a flat vector of integers; shares it."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    if flat.is_complex():
        flat = torch.view_as_real(flat).view(-1)
    return flat.view(_INTEGER[flat.element_size()])
