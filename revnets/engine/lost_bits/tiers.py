"""Differences in tiers, on devices for which waiting is worse than a longer code.

Every element has a code of 4 bits; -8 among these says that the difference did not fit and that the next entry of the
8-bit tier holds it; -128 there points to the 16-bit tier, and so on up to the width of the state. Entries of a tier lie
in the order of memory, so no index is kept.

A tier's length is known only after the elements have been looked at, and asking for it would make the host wait. So
`encode` fills tiers of the greatest possible length and sends the counts home without waiting, and `compact`, called
some cells later when they have long arrived, cuts the tiers to length.
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
    counts: Tensor | None = None  # lengths of the tiers, on their way to the host
    arrived: torch.Event | None = None
    limit: int = 0  # bytes of the state

    @classmethod
    def encode(cls, past: Tensor, rebuilt: Tensor) -> Tiers:
        """By prefix sums: no operation here makes the host wait for the device."""
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
        home = torch.stack(counts).to("cpu", non_blocking=True)
        arrived = None
        if difference.device.type != "cpu":
            arrived = torch.Event(difference.device)
            arrived.record()
        return cls(_pack(nibbles), tiers, home, arrived, past.nbytes)

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
            bits.index_add_(0, index, wide.to(bits.dtype) + 8)  # the code -8 was added already

    @property
    def is_pending(self) -> bool:
        return self.counts is not None

    @property
    def nbytes(self) -> int:
        return self.nibbles.nbytes + sum(tier.nbytes for tier in self.tiers)


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
