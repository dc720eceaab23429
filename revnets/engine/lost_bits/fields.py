"""Differences packed into bit fields of the widths from `rounding.py`, on the CPU.

| stream | content |
| --- | --- |
| words | the low w bits of every difference, consecutively |
| signs | one bit for each field equal to 2^(w-1), which has the same bits as -2^(w-1) |
| wide | whole differences of elements without a width |
| gaps, outside | positions and values of differences that exceed their field, which is rare |

Fields are first joined in pairs and then in groups of four, of at most 60 bits, which are written to the words. NumPy
takes a third of PyTorch's time for so many short operations. Elements are processed in blocks that fit the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from revnets.engine.lost_bits.rounding import Magnification, bits_of, layout_of, widest, widths

_BLOCK = 2**16  # elements; a multiple of the fields in a group

Integers = NDArray[np.signedinteger]
Shorts = NDArray[np.int16]


@dataclass(slots=True)
class Fields:
    """Difference between a state and its reconstruction."""

    words: Tensor  # int64
    signs: Tensor  # uint8, eight per byte; each block starts a byte
    wide: Tensor  # integers of the width of the state
    gaps: Tensor  # between positions; the smallest sufficient integers
    outside: Tensor  # the smallest sufficient integers

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.words, self.signs, self.wide, self.gaps, self.outside))

    @property
    def is_pending(self) -> bool:
        return False

    def compact(self) -> bool:
        return True

    @classmethod
    def encode(cls, past: Tensor, rebuilt: Tensor, state: Tensor, gamma: Tensor | float) -> Fields:
        """Encode the difference between `past` and `rebuilt`. All tensors are dense, with the strides of `past`."""
        blocks = _Blocks(past, rebuilt, state, gamma)
        words: list[Integers] = []
        signs: list[NDArray[np.uint8]] = []
        wide: list[Integers] = []
        places: list[NDArray[np.intp]] = []
        outside: list[Integers] = []
        for part in blocks.parts():
            width, difference = blocks.widths(part), blocks.past[part] - blocks.rebuilt[part]
            unbounded = _take_unbounded(width, blocks.limit)
            if len(unbounded):
                wide.append(difference[unbounded])
                difference[unbounded] = 0
            low, unused = difference.astype(np.int16), 16 - width
            high = np.left_shift(low, unused)
            centered = high >> unused
            escaped = centered != low
            escaped &= centered != -low  # equal at one end, where the sign bit decides
            escaped |= difference != low
            if escaped.any():
                at = np.flatnonzero(escaped)
                places.append(at + part.start)
                outside.append(difference[at])
                low[at] = high[at] = 0
            signs.append(np.packbits(low[_ends(high)] > 0))
            low &= ~np.left_shift(np.int16(-1), width)
            words.append(_join(low, width))
        streams = (
            np.concatenate([*words, _NONE]),
            np.concatenate([*signs, _NONE.view(np.uint8)]),
            np.concatenate([*wide, _NONE.view(blocks.past.dtype)]),
            _narrowest(np.diff(np.concatenate([*places, _NONE]), prepend=0)),
            _narrowest(np.concatenate([*outside, _NONE.view(blocks.past.dtype)])),
        )
        return cls(*(torch.from_numpy(part).clone() for part in streams))  # pyright: ignore[reportUnknownMemberType]

    def decode(self, rebuilt: Tensor, state: Tensor, gamma: Tensor | float) -> None:
        """Turn `rebuilt` into the original state, in place."""
        blocks = _Blocks(rebuilt, rebuilt, state, gamma)
        words, signs, wide = self.words.numpy(), self.signs.numpy(), self.wide.numpy()
        for part in blocks.parts():
            width = blocks.widths(part)
            unbounded = _take_unbounded(width, blocks.limit)
            low, used = _split(words, width)
            words = words[used:]
            unused = 16 - width
            low <<= unused
            ends = _ends(low)
            low >>= unused
            above = ends[np.flatnonzero(np.unpackbits(signs, count=len(ends)))]
            low[above] = -low[above]
            signs = signs[-(-len(ends) // 8) :]
            target = blocks.rebuilt[part]
            target += low
            if len(unbounded):
                target[unbounded] += wide[: len(unbounded)]
                wide = wide[len(unbounded) :]
        blocks.rebuilt[self.gaps.numpy().cumsum(dtype=np.intp)] += self.outside.numpy()


_NONE = np.empty(0, np.int64)


class _Blocks:
    """The memory of the tensors as integers, processed in blocks."""

    def __init__(self, past: Tensor, rebuilt: Tensor, state: Tensor, gamma: Tensor | float):
        self.past, self.rebuilt, self.state = (bits_of(tensor).numpy() for tensor in (past, rebuilt, state))
        magnification = Magnification.of(gamma)
        self.exact, self.magnification = magnification.exact, magnification.along(past)
        self.layout = layout_of(past.dtype)
        self.limit = widest(self.layout)

    def parts(self) -> list[slice]:
        return [slice(start, start + _BLOCK) for start in range(0, len(self.past), _BLOCK)]

    def widths(self, part: slice) -> Shorts:
        magnification = self.magnification if isinstance(self.magnification, int) else self.magnification[part]
        return widths(self.state[part], self.rebuilt[part], magnification, self.exact, self.layout)


def _take_unbounded(width: Shorts, limit: int) -> NDArray[np.intp]:
    """Return the positions without a width, and set their width to 0."""
    if not (unbounded := width > limit).any():
        return np.empty(0, np.intp)
    width[unbounded] = 0
    return np.flatnonzero(unbounded)


def _ends(high: Shorts) -> NDArray[np.intp]:
    """Return the positions of fields, shifted to the top, that equal -2^(w-1) or 2^(w-1)."""
    return np.flatnonzero(high == np.iinfo(np.int16).min)


def _narrowest(values: Integers) -> Integers:
    """Convert to the smallest integers that represent all values."""
    for integer in (np.int8, np.int16, np.int32):
        limits = np.iinfo(integer)
        if not len(values) or (values.min() >= limits.min and values.max() <= limits.max):
            return values.astype(integer)
    return values


def _join(low: Shorts, width: Shorts) -> Integers:
    """Pack the fields consecutively, the first one in the lowest bits of the first word."""
    fields, sizes = _padded(low), _padded(width)
    for integer in (np.int32, np.int64):
        fields, sizes = fields.view(integer), sizes.view(integer)
        half = 4 * fields.itemsize
        first = sizes & ((1 << half) - 1)
        second = fields >> half
        second <<= first
        fields = fields & ((1 << half) - 1)
        fields |= second
        sizes = sizes >> half
        sizes += first
    ends = sizes.cumsum()
    count = (int(ends[-1]) + 63) >> 6
    bit = ends - sizes
    word = bit >> 6
    bit &= 63
    begins = np.append(0, np.flatnonzero(word[1:] != word[:-1]) + 1)  # groups are short, so one starts in every word
    last = np.append(begins[1:], len(word)) - 1  # the last group of a word may continue in the next word
    words = np.zeros(len(begins) + 1, np.int64)
    words[:-1] = np.bitwise_or.reduceat(fields << bit, begins)
    words[1:] |= (fields[last] >> 1) >> (63 - bit[last])
    return words[:count]


def _split(words: Integers, width: Shorts) -> tuple[Shorts, int]:
    """Unpack the fields, with bits of other fields above them; also return the number of words they take."""
    pairs = _padded(width).view(np.int32)
    first_of_pair = pairs & 0xFFFF
    pairs = pairs >> 16
    pairs += first_of_pair
    groups = pairs.view(np.int64)
    first_of_group = groups & 0xFFFFFFFF
    groups = groups >> 32
    groups += first_of_group
    ends = groups.cumsum()
    if not ends[-1]:
        return np.zeros_like(width), 0
    bit = ends - groups
    word = bit >> 6
    bit &= 63
    fields = words.take(word, mode="clip").view(np.uint64)
    fields >>= bit.view(np.uint64)
    fields = fields.view(np.int64)
    word += 1
    following = words.take(word, mode="clip")
    following <<= 1
    following <<= np.subtract(63, bit, out=bit)
    fields |= following
    joined = _apart(fields, first_of_group).view(np.int32)
    return _apart(joined, first_of_pair).view(np.int16)[: len(width)], (int(ends[-1]) + 63) >> 6


def _apart(joined: Integers, first: Integers) -> Integers:
    """Split each number into two halves, in place; `first` is the number of bits of the first one."""
    half = 4 * joined.itemsize
    second = joined >> first
    second <<= half
    joined &= (1 << half) - 1
    joined |= second
    return joined


def _padded(values: Shorts) -> Shorts:
    """Pad to whole groups of four."""
    return np.pad(values, (0, -len(values) % 4)) if len(values) % 4 else values
