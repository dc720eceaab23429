"""The bit fields of `fields.py` on a GPU: one kernel to encode, one to decode, without waiting for the device.

Each program of a kernel codes one block of elements. It first counts the words of its block and reserves them with an
atomic counter, so the order of blocks is arbitrary. The words of a block hold, each starting at a word: the fields; the
signs of fields at an end; whole differences of elements without a width; pairs of position and difference for those
outside their field.
"""

# Kernels are written in Triton's language, and Triton may not be installed:
# pyright: basic, reportMissingImports=false, reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from revnets.engine.lost_bits.rounding import TOLERANCE, Magnification, bits_of, layout_of, widest

_BLOCK = 2048
_MANTISSA = tl.constexpr(round((2 * TOLERANCE - 1) * 2**23))  # float32 mantissa below which gamma is rounded down


@dataclass(slots=True)
class BlockFields:
    """Difference between a state and its reconstruction, on its device."""

    words: Tensor  # int64; the first counts those in use
    headers: Tensor  # int32 (blocks, 2): first word of a block, number of differences outside their field
    limit: int  # bytes of the state
    count: Tensor | None = None  # number of words in use, being copied to the host
    arrived: torch.Event | None = None

    @classmethod
    def encode(cls, past: Tensor, rebuilt: Tensor, state: Tensor, gamma: Tensor | float) -> "BlockFields":
        """Encode the difference between `past` and `rebuilt`. All tensors are dense, with the strides of `past`."""
        capacity = past.nbytes // 8
        words = torch.zeros(1 + capacity, dtype=torch.int64, device=past.device)
        headers = torch.empty(triton.cdiv(past.numel(), _BLOCK), 2, dtype=torch.int32, device=past.device)
        with _launching_on(past.device):
            _encode[(len(headers),)](
                bits_of(past), bits_of(rebuilt), bits_of(state), *_gamma(gamma, past), words, headers, capacity,
                **_constants(past, gamma),
            )  # fmt: skip
            count = words[:1].to("cpu", non_blocking=True)
            arrived = None
            if past.device.type != "cpu":
                arrived = torch.Event(past.device)
                arrived.record()
        return cls(words, headers, past.nbytes, count, arrived)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.headers.nbytes

    @property
    def is_pending(self) -> bool:
        return self.count is not None

    def compact(self) -> bool:
        if self.count is not None:
            if self.arrived is not None:
                self.arrived.synchronize()
            count, self.count, self.arrived = int(self.count), None, None
            if count > len(self.words) - 1:
                return False  # blocks that did not fit were not written
            self.words = self.words[: 1 + count].clone()
        return self.nbytes < self.limit

    def decode(self, rebuilt: Tensor, state: Tensor, gamma: Tensor | float) -> None:
        """Turn `rebuilt` into the original state, in place."""
        with _launching_on(rebuilt.device):
            _decode[(len(self.headers),)](
                bits_of(rebuilt), bits_of(state), *_gamma(gamma, rebuilt), self.words, self.headers,
                **_constants(rebuilt, gamma),
            )  # fmt: skip


def _launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Make `device` current, because Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _gamma(gamma: Tensor | float, past: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    """Return gamma as arguments of the kernels.

    Returns:
        The float32 values, the number of consecutive elements in memory that share a value, the number of values, the
        number of elements of the state and, if gamma is a number, its magnification and whether that is exact.
    """
    if not isinstance(gamma, Tensor):
        magnification = Magnification.of(gamma)
        assert isinstance(magnification.bits, int)
        return past, 1, 1, past.numel(), magnification.bits, int(magnification.exact)
    gamma = gamma.detach().float()
    varies = [axis for axis in range(-gamma.ndim, 0) if gamma.shape[axis] > 1]
    if len(varies) > 1 or gamma.ndim > past.ndim:
        spread = torch.empty_strided(past.shape, past.stride(), dtype=torch.float32, device=past.device)
        return spread.copy_(gamma), 1, past.numel(), past.numel(), 0, 0
    inner = past.stride(varies[0]) if varies else 1
    return gamma.reshape(-1), inner, gamma.numel(), past.numel(), 0, 0


def _constants(past: Tensor, gamma: Tensor | float) -> dict[str, int | bool]:
    layout = layout_of(past.dtype)
    return {
        "learned": isinstance(gamma, Tensor),
        "narrow": layout.size == 2,
        "exponent": layout.exponent_mask,
        "mantissa": layout.mantissa,
        "limit": widest(layout),
        "block": _BLOCK,
    }


@triton.jit
def _encode(
    past_bits, rebuilt_bits, state_bits, gamma, inner, channels, numel, magnification, is_exact, words, headers,
    capacity,
    learned: tl.constexpr, narrow: tl.constexpr, exponent: tl.constexpr, mantissa: tl.constexpr, limit: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    place = tl.arange(0, block)
    offset = program.to(tl.int64) * block + place
    inside = offset < numel
    rebuilt = tl.load(rebuilt_bits + offset, inside, 0).to(tl.int32)
    state = tl.load(state_bits + offset, inside, 0).to(tl.int32)
    difference = tl.load(past_bits + offset, inside, 0).to(tl.int32) - rebuilt
    if narrow:
        difference = (difference << 16) >> 16
    width = _widths(rebuilt, state, offset, inside, gamma, inner, channels, magnification, is_exact,
                    learned, exponent, mantissa, limit)  # fmt: skip
    wide = width > limit
    width = tl.where(wide, 0, width)
    centered = _center(difference, width)
    ends = (width > 0) & (centered == -(1 << tl.maximum(width - 1, 0)))
    outside = (centered != difference) & (centered != -difference) & ~wide
    ends = ends & ~outside
    low = tl.where(outside, 0, difference & ((1 << width) - 1))
    field_words = (tl.sum(width, 0) + 63) >> 6
    sign_words = (tl.sum(ends.to(tl.int32), 0) + 63) >> 6
    wide_words = _words_of_wide(wide, narrow)
    count = tl.sum(outside.to(tl.int32), 0)
    needed = field_words + sign_words + wide_words + count
    start = tl.atomic_add(words, needed.to(tl.int64))
    tl.store(headers + 2 * program, start.to(tl.int32))
    tl.store(headers + 2 * program + 1, count)
    if start + needed <= capacity:
        target = words + 1 + start
        _write(target, low, width, block)
        target += field_words
        _write(target, (ends & (difference > 0)).to(tl.int32), ends.to(tl.int32), block)
        target += sign_words
        kind = past_bits.dtype.element_ty
        whole = target.to(tl.pointer_type(kind), bitcast=True) + tl.cumsum(wide.to(tl.int32), 0) - 1
        tl.store(whole, difference.to(kind), mask=wide)
        pairs = (target + wide_words).to(tl.pointer_type(tl.int32), bitcast=True)
        pairs += 2 * (tl.cumsum(outside.to(tl.int32), 0) - 1)
        tl.store(pairs, place, mask=outside)
        tl.store(pairs + 1, difference, mask=outside)


@triton.jit
def _decode(
    rebuilt_bits, state_bits, gamma, inner, channels, numel, magnification, is_exact, words, headers,
    learned: tl.constexpr, narrow: tl.constexpr, exponent: tl.constexpr, mantissa: tl.constexpr, limit: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    place = tl.arange(0, block)
    offset = program.to(tl.int64) * block + place
    inside = offset < numel
    rebuilt = tl.load(rebuilt_bits + offset, inside, 0).to(tl.int32)
    state = tl.load(state_bits + offset, inside, 0).to(tl.int32)
    width = _widths(rebuilt, state, offset, inside, gamma, inner, channels, magnification, is_exact,
                    learned, exponent, mantissa, limit)  # fmt: skip
    wide = width > limit
    width = tl.where(wide, 0, width)
    source = words + 1 + tl.load(headers + 2 * program)
    count = tl.load(headers + 2 * program + 1)
    centered = _center(_read(source, width, block), width)
    ends = ((width > 0) & (centered == -(1 << tl.maximum(width - 1, 0)))).to(tl.int32)
    source += (tl.sum(width, 0) + 63) >> 6
    above = (_read(source, ends, block) & ends) == 1
    source += (tl.sum(ends, 0) + 63) >> 6
    kind = rebuilt_bits.dtype.element_ty
    whole = source.to(tl.pointer_type(kind), bitcast=True) + tl.cumsum(wide.to(tl.int32), 0) - 1
    found = rebuilt + tl.where(above, -centered, centered) + tl.load(whole, mask=wide, other=0)
    tl.store(rebuilt_bits + offset, found.to(kind), mask=inside)
    if count > 0:
        tl.debug_barrier()  # other threads wrote these elements above
        source += _words_of_wide(wide, narrow)
        pairs = source.to(tl.pointer_type(tl.int32), bitcast=True) + 2 * place
        at = program.to(tl.int64) * block + tl.load(pairs, mask=place < count, other=0)
        plain = tl.load(rebuilt_bits + at, mask=place < count, other=0).to(tl.int32)
        more = tl.load(pairs + 1, mask=place < count, other=0)
        tl.store(rebuilt_bits + at, (plain + more).to(kind), mask=place < count)


@triton.jit
def _widths(
    rebuilt, state, offset, inside, gamma, inner, channels, magnification, is_exact,
    learned: tl.constexpr, exponent: tl.constexpr, mantissa: tl.constexpr, limit: tl.constexpr,
):  # fmt: skip
    """Like `rounding.widths`, but checks for each gamma whether it is a power of two."""
    if learned:
        value = tl.load(gamma + (offset // inner) % channels, inside, 1.0).to(tl.int32, bitcast=True)
        part = value & 0x7FFFFF
        magnification = 126 - ((value >> 23) & 0xFF) + (part < _MANTISSA).to(tl.int32)
        is_exact = part == 0
    else:
        is_exact = is_exact + tl.zeros_like(rebuilt) > 0
    window = ((state & exponent) >> mantissa) - ((rebuilt & exponent) >> mantissa) + magnification
    exact = tl.where(window == 0, 1, tl.maximum(window, 0))
    width = tl.minimum(tl.where(is_exact, exact, tl.maximum(window, 1)), limit + 1)
    return tl.where(inside, width, 0)


@triton.jit
def _words_of_wide(wide, narrow: tl.constexpr):
    each = 16 if narrow else 32
    return (tl.sum(wide.to(tl.int32), 0) * each + 63) >> 6


@triton.jit
def _center(low, width):
    """Return the number in -2^(w-1), ..., 2^(w-1) - 1 that has these low w bits."""
    unused = tl.minimum(32 - width, 31)
    return tl.where(width > 0, (low << unused) >> unused, 0)


@triton.jit
def _write(target, low, width, block: tl.constexpr):
    """Write the fields consecutively into words that are 0."""
    first, second = tl.split(low.to(tl.int64).reshape(block // 2, 2))
    shift, more = tl.split(width.reshape(block // 2, 2))
    first, second = tl.split((first | (second << shift)).reshape(block // 4, 2))
    shift, more = tl.split((shift + more).reshape(block // 4, 2))
    fields, size = first | (second << shift), shift + more
    begin = tl.cumsum(size, 0) - size
    bit = begin & 63
    tl.atomic_or(target + (begin >> 6), fields << bit, mask=size > 0)
    tl.atomic_or(target + (begin >> 6) + 1, (fields >> 1) >> (63 - bit), mask=bit + size > 64)


@triton.jit
def _read(source, width, block: tl.constexpr):
    """Read the fields, with bits of other fields above them."""
    first_of_pair, more = tl.split(width.reshape(block // 2, 2))
    first_of_group, other = tl.split((first_of_pair + more).reshape(block // 4, 2))
    size = first_of_group + other
    begin = tl.cumsum(size, 0) - size
    bit = begin & 63
    fields = tl.load(source + (begin >> 6), mask=size > 0, other=0).to(tl.uint64, bitcast=True) >> bit.to(tl.uint64)
    following = tl.load(source + (begin >> 6) + 1, mask=bit + size > 64, other=0)
    fields = fields.to(tl.int64, bitcast=True) | ((following << 1) << (63 - bit))
    fields = tl.join(fields, fields >> first_of_group).reshape(block // 2)
    fields = tl.join(fields, fields >> first_of_pair).reshape(block)
    return fields.to(tl.int32)
