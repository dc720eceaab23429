"""Differences coded in tiers, for devices where waiting costs more than a longer code.

Every element has a 4-bit code. The code -8 means that the difference does not fit, and that the next entry of the
8-bit tier holds it; -128 there refers to the 16-bit tier, and so on up to the width of the state. Entries of a tier
follow the order of memory, so no index is stored.

The length of a tier depends on the values, and reading it would make the host wait. So `encode` allocates tiers of the
maximum length and copies the counts to the host asynchronously. `compact`, called some cells later when the counts
have arrived, truncates the tiers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from revnets.engine.lost_bits.rounding import bits_of

_WIDTHS = (torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(slots=True)
class Tiers:
    """Difference between a state and its reconstruction, in units in the last place."""

    nibbles: Tensor  # uint8: element i in the low half of byte i, element half + i in the high half
    tiers: list[Tensor]  # int8, int16, ... up to the width of the state
    counts: Tensor | None = None  # lengths of the tiers, being copied to the host
    arrived: torch.Event | None = None
    limit: int = 0  # bytes of the state

    @classmethod
    def encode(cls, past: Tensor, rebuilt: Tensor) -> Tiers:
        """Encode with prefix sums, without making the host wait for the device."""
        difference = bits_of(rebuilt)
        torch.sub(bits_of(past), difference, out=difference)
        nibbles = difference.clamp(-8, 8).to(torch.int8)  # 8 and -8 have the same low half
        left, mask = difference, nibbles.abs() == 8
        tiers: list[Tensor] = []
        counts: list[Tensor] = []
        for dtype in _WIDTHS[: _WIDTHS.index(difference.dtype) + 1]:
            count = mask.sum()
            left, mask = _to_front(left, mask), torch.arange(mask.numel(), device=mask.device) < count
            code, escaped = _narrow(left, dtype)
            tiers.append(code)
            counts.append(count)
            if escaped is not None:
                mask = mask & escaped
        lengths = torch.stack(counts).to("cpu", non_blocking=True)
        arrived = None
        if difference.device.type != "cpu":
            arrived = torch.Event(difference.device)
            arrived.record()
        return cls(_pack(nibbles), tiers, lengths, arrived, past.nbytes)

    def compact(self) -> bool:
        if self.counts is not None:
            if self.arrived is not None:
                self.arrived.synchronize()
            lengths = self.counts.numpy().tolist()
            self.tiers = [tier[:length].clone() for tier, length in zip(self.tiers, lengths, strict=True)]
            self.counts = self.arrived = None
        return self.nbytes < self.limit

    def decode(self, rebuilt: Tensor, state: Tensor, gamma: Tensor | float) -> None:
        self.compact()
        bits = bits_of(rebuilt)
        nibbles = _unpack(self.nibbles, bits.numel())
        bits.add_(nibbles)
        wide = self.tiers[-1]
        for code in reversed(self.tiers[:-1]):
            escaped = code == torch.iinfo(code.dtype).min
            wide = code.to(bits.dtype).masked_scatter_(escaped, wide.to(bits.dtype))
        if wide.numel():
            index = (nibbles == -8).nonzero().squeeze(1)
            bits.index_add_(0, index, wide.to(bits.dtype) + 8)  # the code -8 is already added

    @property
    def is_pending(self) -> bool:
        return self.counts is not None

    @property
    def nbytes(self) -> int:
        return self.nibbles.nbytes + sum(tier.nbytes for tier in self.tiers)


def _to_front(values: Tensor, mask: Tensor) -> Tensor:
    """Move the masked values to the front, in order; the values after them are undefined."""
    place = torch.where(mask, mask.cumsum(0) - 1, values.numel())
    front = values.new_zeros(values.numel() + 1)
    return front.scatter_(0, place, values)[:-1]


def _narrow(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return codes of a narrower dtype, and a mask of the values that do not fit, whose code is the smallest one."""
    if dtype == values.dtype:
        return values, None
    code = values.to(dtype)
    lowest = torch.iinfo(dtype).min
    escaped = (code != values) | (code == lowest)
    return code.masked_fill_(escaped, lowest), escaped


def _pack(nibbles: Tensor) -> Tensor:
    """Pack two signed 4-bit numbers per byte: element i and element half + i, so that all reads are contiguous."""
    half = (nibbles.numel() + 1) // 2
    packed = nibbles[:half].bitwise_and(15)
    packed[: nibbles.numel() - half].bitwise_or_(nibbles[half:].bitwise_left_shift(4))
    return packed


def _unpack(packed: Tensor, numel: int) -> Tensor:
    low = packed.bitwise_left_shift(4).bitwise_right_shift_(4)  # arithmetic shifts restore the sign
    high = packed[: numel - packed.numel()].bitwise_right_shift(4)
    return torch.cat((low, high))
