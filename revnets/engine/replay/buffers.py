"""Buffers of a cell at the start of its forward pass, copied only if the forward pass writes them.

A replay must see the buffers of its forward pass, and must not update them a second time. Which buffers a forward pass
writes is known only afterwards, when the old values are gone. So all buffers are copied before the first forward pass
of a cell, and compared with the copies after it. In later forward passes

- a buffer of at most `SMALL` bytes is always copied: counters, statistics, vectors of spectral norm;
- a larger buffer is copied if a forward pass with the same train/eval flags has ever written it;
- other buffers are not copied. The replay uses the buffer itself, and checks its version.

If a later forward pass is the first to write a large buffer in place, the old value is lost: the replay raises a
`ReplayError`, and further forward passes copy the buffer. A buffer that is replaced (`self.table = ...`) is safe.

The first comparison is by value, because writes through `.data` do not change the version.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revnets.engine.errors import ReplayError
from revnets.engine.torch_internals import FakeTensor, buffers_of, has_values

SMALL = 64 * 1024
"""Bytes up to which a buffer is always copied."""

Overwritten = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""By id and version: a buffer that a cell has written, and a copy of its content at this version."""

Place = tuple[int, str]
"""Index of a module in its cell, and the name of a buffer of that module."""


class BufferUse:
    """How past forward passes of one cell, with the same train/eval flags, used its buffers.

    It belongs to the cell, not to a pass: it decides what is copied, never what a replay computes.
    """

    def __init__(self) -> None:
        self.read_only: dict[Place, weakref.ref[nn.Module]] = {}  # modules may be replaced
        self.silent: dict[Place, weakref.ref[nn.Module]] = {}  # written without a new version
        self.written: set[Place] = set()

    def is_read_only(self, place: Place, module: nn.Module, buffer: Tensor) -> bool:
        known = self.read_only.get(place)
        return known is not None and known() is module and buffer.nbytes > SMALL and _is_plain(buffer)

    def is_silent(self, place: Place, module: nn.Module) -> bool:
        known = self.silent.get(place)
        return known is not None and known() is module

    def is_new(self, place: Place, module: nn.Module) -> bool:
        known = self.read_only.get(place) or self.silent.get(place)
        return place not in self.written and (known is None or known() is not module)


_uses: weakref.WeakKeyDictionary[nn.Module, dict[tuple[bool, ...], BufferUse]] = weakref.WeakKeyDictionary()


def use_of(cell: nn.Module, training: Sequence[bool]) -> BufferUse:
    """Return the use of a cell's buffers under these flags."""
    return _uses.setdefault(cell, {}).setdefault(tuple(training), BufferUse())


class _Before(NamedTuple):
    place: Place
    module: nn.Module
    buffer: Tensor
    version: int
    copy: Tensor | None


class CellBuffers:
    """The buffers of one cell in one pass.

    Args:
        modules: All modules of the cell.
        overwritten: Buffers that cells of this pass have written, for earlier cells that read them.
    """

    def __init__(self, modules: Sequence[nn.Module], overwritten: Overwritten):
        self.modules = modules
        self.written: dict[Place, Tensor] = {}  # copies from before the call
        self.read: dict[Place, tuple[Tensor, int]] = {}  # all other buffers, and their versions
        self.lost: dict[Place, Tensor] = {}  # buffers whose old values are lost
        self._overwritten = overwritten

    @contextmanager
    def recorded(self, cell: nn.Module, training: Sequence[bool]) -> Generator[None]:
        """Record which buffers the body, the call of the cell, writes; `training` holds the flags of its modules."""
        use = use_of(cell, training)
        before = [
            _Before(
                place,
                module,
                buffer,
                buffer._version,
                None if use.is_read_only(place, module, buffer) else buffer.detach().clone(),
            )
            for place, module, buffer in self._present()
        ]
        yield
        for place, module, buffer, version, copy in before:
            changed = buffer._version != version
            if copy is None:
                if changed:
                    self.lost[place] = buffer
                    use.read_only.pop(place, None)
                    use.written.add(place)
                else:
                    self.read[place] = buffer, version
                continue
            if not changed and _can_compare(buffer, copy) and use.is_new(place, module):
                known = use.read_only if _is_equal(buffer, copy) else use.silent
                known[place] = weakref.ref(module)
            if changed:
                use.read_only.pop(place, None)
                use.written.add(place)
            changed = changed or use.is_silent(place, module)
            if changed or buffers_of(module).get(place[1]) is not buffer:
                self.written[place] = copy
                self._overwritten.setdefault((id(buffer), version), (buffer, copy))
            else:
                self.read[place] = buffer, version

    def check(self) -> None:
        """Check that the values of the forward pass are still available.

        Raises:
            ReplayError: If a buffer was changed in place after the forward pass, or in it for the first time.
        """
        for (index, name), buffer in self.lost.items():
            raise ReplayError(
                f"the buffer {name} of {type(self.modules[index]).__name__}, of shape {tuple(buffer.shape)}, was "
                "written in place by this forward pass for the first time, so its old value is lost: a large buffer is "
                "copied only once it is known to be written. Run this step again, add the cell to `stored` of the "
                "columns, or use memory='store'",
                code="buffer-lost",
            )
        for (index, name), (buffer, version) in self.read.items():
            if buffer._version != version and (id(buffer), version) not in self._overwritten:
                raise ReplayError(
                    f"the buffer {name} of {type(self.modules[index]).__name__} was changed in place between the "
                    "forward pass and its backward; call backward() first. (DDP writes buffers in every forward pass "
                    "unless broadcast_buffers=False.)",
                    code="changed-in-place",
                )

    @contextmanager
    def restored(self) -> Generator[None]:
        """Give the cell the buffers of the forward pass, also those of functional_call. Shared buffers stay shared.

        Raises:
            ReplayError: If the body wrote a buffer that the forward pass only read.
        """
        present = list(self._present())
        seen: dict[int, Tensor] = {}
        lent: list[tuple[Place, Tensor, int]] = []
        for place, module, buffer in present:
            if id(buffer) not in seen:
                seen[id(buffer)] = self._value(place, buffer, lent)
            buffers_of(module)[place[1]] = seen[id(buffer)]
        try:
            yield
        finally:
            for (_, name), module, buffer in present:
                buffers_of(module)[name] = buffer
        for (index, name), buffer, version in lent:
            if buffer._version != version:
                raise ReplayError(
                    f"the buffer {name} of {type(self.modules[index]).__name__} was only read in the forward pass, but "
                    "is written in the replay. The cell takes another code path in its replay: does it depend on a "
                    "call counter or on global state?"
                )

    def _present(self) -> Iterator[tuple[Place, nn.Module, Tensor]]:
        for index, module in enumerate(self.modules):
            for name, buffer in buffers_of(module).items():
                if buffer is not None:
                    yield (index, name), module, buffer

    def _value(self, place: Place, now: Tensor, lent: list[tuple[Place, Tensor, int]]) -> Tensor:
        if place in self.written:
            return self.written[place].clone()
        if place not in self.read:
            return now.detach().clone()  # created by the forward pass, such as a cache
        buffer, version = self.read[place]
        if buffer._version != version:
            return self._overwritten[id(buffer), version][1].clone()
        if buffer.nbytes <= SMALL or not _is_plain(buffer):
            return buffer.detach().clone().requires_grad_(buffer.requires_grad)
        lent.append((place, buffer, version))
        return buffer.detach().requires_grad_() if buffer.requires_grad else buffer


def _is_plain(buffer: Tensor) -> bool:
    """Whether this is a plain tensor. Others, such as sparse and sharded ones, are always copied."""
    return buffer.layout is torch.strided and type(buffer) in (Tensor, nn.Parameter, FakeTensor)


def _can_compare(*tensors: Tensor) -> bool:
    return all(_is_plain(tensor) and has_values(tensor) for tensor in tensors)


def _is_equal(buffer: Tensor, copy: Tensor) -> bool:
    alike = (buffer.shape, buffer.dtype, buffer.device) == (copy.shape, copy.dtype, copy.device)
    return alike and torch.equal(buffer, copy)
