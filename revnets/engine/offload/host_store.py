"""What the cells of one pass keep in host memory: lost bits, states, and what autograd saves inside of stored cells.

Forward: when the call of a cell is over, what it keeps is copied to the host. The device lets go of it when the call of
the next cell is over; so much time the copy has to hide in. Backward: when it arrives at a cell, what the cell below
keeps starts to come back.

Memory is copied storage by storage, once for all views of it that a cell keeps. It stays on the device if it is there
anyway (parameters, buffers, the stem, arguments of all cells), if sharded training has emptied it, or if it is small.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revnets.engine.cell_record import CellRecord, Constant, Held
from revnets.engine.lost_bits import LostBits
from revnets.engine.memory_mode import Memory
from revnets.engine.offload.hosted_tensors import HostedStorage, HostedTensor, bytes_of, fetch_storages
from revnets.engine.offload.transfers import Transfer
from revnets.engine.torch_internals import FakeTensor, storage_key, tree_leaves, tree_map

LEAST = 1024
"""Bytes of a storage below which a copy is not worth its launch."""


class OffloadedTensor:
    """What the graph holds in place of a tensor that autograd saves in a cell, and that no replay brings back."""

    __slots__ = ("__weakref__", "_store", "place")

    def __init__(self, tensor: Tensor, store: HostStore):
        self.place: Held | HostedTensor = Held.of(tensor)
        self._store = store  # lives as long as something may come back from it

    def on_device(self) -> Held:
        self._store.settle()  # backward may get here first, past states without a hook
        return self.place.on_device()


class HostStore:
    """Host memory of one pass.

    Args:
        cells: indices of the cells that use it.
        stem: stays on the device, for all cells may read it.
    """

    def __init__(self, cells: Collection[int], stem: Tensor):
        self.cells = cells
        self._stem = storage_key(stem)
        self._is_replayed = False  # is any cell so far?
        self._saved: list[weakref.ref[OffloadedTensor]] = []  # by the cell whose call goes on
        self._storages: dict[int, list[weakref.ref[HostedStorage]]] = defaultdict(list)  # by the index of the cell
        self._outgoing: list[OutgoingCopies] = []
        self._pending: set[int] = set()  # cells whose lost bits are not cut to length yet
        self._lock = threading.RLock()

    # ---------------------------------------------------------------- forward

    def saved(self, index: int, tensor: Tensor) -> Held | OffloadedTensor:
        """What the graph holds in place of a tensor that autograd saves in a cell."""
        if index not in self.cells:
            return Held.of(tensor)
        saved = OffloadedTensor(tensor, self)
        self._saved.append(weakref.ref(saved))
        return saved

    def send(self, record: CellRecord, cell: nn.Module, name: str, state: Tensor) -> None:
        """Start to copy what a cell keeps, after its call, and let go of what the cell before has kept.

        Args:
            name: of the cell, for errors.
            state: x_t.
        """
        index = record.node.index
        self.settle()
        self._is_replayed = self._is_replayed or record.mode is not Memory.STORE
        if not self._is_replayed:
            record.kept = None  # backward of stored cells needs no state, and none before is replayed
        is_handed_through = state.is_leaf or storage_key(state) == self._stem  # and keeps its hooks after this pass
        if state.requires_grad and not is_handed_through:  # its gradient is there when backward arrives at the cell
            hook = partial(_arrive, weakref.ref(self), index)
            state.register_hook(hook)  # pyright: ignore[reportUnknownMemberType]
        if index in self.cells:
            saved = [found for reference in self._saved if (found := reference()) is not None]
            self._saved.clear()
            is_pending = record.lost is not None and record.lost.is_pending
            kept = record.kept if isinstance(record.kept, Held) and not is_pending else None
            resident = {self._stem, *_storages_of(cell), *_storages_of_constants(record.context)}
            copies = OutgoingCopies(f"a tensor that {name} keeps", resident, self._lock)
            for held in (*(item.place for item in saved), kept):
                if isinstance(held, Held):
                    copies.add(held)
            self._begin(index, copies)
            for item in saved:
                item.place = copies.place(item.place)
            if kept is not None:
                record.kept = copies.place(kept)
            if is_pending:
                self._pending.add(index)
            elif record.lost is not None:
                self._send_lost_bits(record, name)

    def send_settled(self, record: CellRecord, name: str) -> None:
        """Start to copy what a cell keeps, once a device has counted its lost bits (`CellRecord.settle`)."""
        if record.node.index not in self._pending:
            return
        self._pending.remove(record.node.index)
        if record.lost is not None:
            self._send_lost_bits(record, name)
        elif isinstance(record.kept, Held):
            copies = OutgoingCopies(f"the state that {name} keeps", {self._stem}, self._lock)
            copies.add(record.kept)
            self._begin(record.node.index, copies)
            record.kept = copies.place(record.kept)

    def _send_lost_bits(self, record: CellRecord, name: str) -> None:
        assert record.lost is not None
        copies = OutgoingCopies(f"the lost bits of {name}", set(), self._lock)
        _mapped(record.lost, Tensor, lambda tensor: copies.add(Held.of(tensor)))
        self._begin(record.node.index, copies)
        record.lost = _mapped(record.lost, Tensor, copies.hosted)

    def _begin(self, index: int, copies: OutgoingCopies) -> None:
        copies.begin()
        self._outgoing.append(copies)
        self._storages[index] += [weakref.ref(storage) for storage in copies.storages.values()]

    def settle(self) -> None:
        """Let the device have back the memory whose copies are under way, when they are over."""
        with self._lock:
            for copies in self._outgoing:
                copies.end()
            self._outgoing.clear()

    # --------------------------------------------------------------- backward

    def lost_bits_of(self, record: CellRecord) -> LostBits | None:
        """The lost bits of a cell, on the device."""
        self.settle()
        return None if record.lost is None else _mapped(record.lost, HostedTensor, HostedTensor.tensor)

    def arrive(self, index: int) -> None:
        """Backward is at this cell: fetch what it and the next one keep, and release what is behind."""
        self.settle()
        with self._lock:
            for cell in self._storages:
                if cell > index + 1:  # while this cell is replayed, the tape may ask for a state of the one above
                    for storage in self._alive(cell):
                        storage.release()
            for cell in (index, index - 1):
                fetch_storages(self._alive(cell))

    def _alive(self, cell: int) -> list[HostedStorage]:
        found = (reference() for reference in self._storages.get(cell, ()))
        return [storage for storage in found if storage is not None]


class OutgoingCopies:
    """Copies of what one cell keeps, on their way to the host.

    Args:
        name: of what is copied, for errors.
        resident: keys of storages that stay on the device.
    """

    def __init__(self, name: str, resident: Collection[int], lock: threading.RLock):
        self.name = name
        self.storages: dict[int, HostedStorage] = {}
        self._resident = resident
        self._lock = lock
        self._sources: list[tuple[Held, HostedStorage]] = []
        self._transfers: list[Transfer] = []

    def add(self, held: Held) -> None:
        """Copy the storage of this tensor as well, unless it is one that stays on the device."""
        tensor = held.tensor
        if not is_plain(tensor) or (key := storage_key(tensor)) in self._resident:
            return
        if tensor.untyped_storage().nbytes() < LEAST:  # 0 if sharded training has emptied it
            return
        if key not in self.storages:
            self.storages[key] = HostedStorage(tensor, self.name, self._lock)
        self._sources.append((held, self.storages[key]))

    def begin(self) -> None:
        """Start the copies."""
        pairs: dict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for storage, tensor in self._sources_by_storage():
            source = bytes_of(tensor)
            pairs[tensor.device].append((storage.buffer[: source.numel()], source))
        self._transfers = [Transfer(device, found) for device, found in pairs.items()]
        self._note_changes()

    def _sources_by_storage(self) -> Iterator[tuple[HostedStorage, Tensor]]:
        """Each storage once, by the tensor with the smallest elements, which reach to its end."""
        for storage in self.storages.values():
            tensors = [held.tensor for held, of in self._sources if of is storage]
            yield storage, min(tensors, key=Tensor.element_size)

    def end(self) -> None:
        """Let the present stream go on behind the copies, and let go of what was copied."""
        for transfer in self._transfers:
            transfer.wait()
        self._note_changes()
        self._sources.clear()

    def _note_changes(self) -> None:
        for held, storage in self._sources:
            storage.is_changed = storage.is_changed or held.tensor._version != held.version

    def hosted(self, tensor: Tensor) -> Tensor | HostedTensor:
        """The hosted tensor of one that was added, or the tensor itself if it stays on the device."""
        storage = self.storages.get(storage_key(tensor)) if is_plain(tensor) else None
        return tensor if storage is None else HostedTensor(tensor, storage)

    def place(self, held: Held | HostedTensor) -> Held | HostedTensor:
        """As `hosted`, of a tensor that the tape holds."""
        found = self.hosted(held.tensor) if isinstance(held, Held) else held
        return found if isinstance(found, HostedTensor) else held


def is_plain(tensor: Tensor) -> bool:
    """Is the tensor nothing but a strided view of its storage, with values?"""
    known = type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.layout is torch.strided
    return known and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())


def _storages_of(cell: nn.Module) -> set[int]:
    return {storage_key(tensor) for tensor in (*cell.parameters(), *cell.buffers()) if is_plain(tensor)}


def _storages_of_constants(context: Any) -> set[int]:
    constants = (item.held.tensor for item in tree_leaves(context) if isinstance(item, Constant))
    return {storage_key(tensor) for tensor in constants if is_plain(tensor)}


def _mapped(lost: LostBits, kind: type, function: Callable[[Any], Any]) -> LostBits:
    """Lost bits with something in place of their tensors, or the other way."""

    def mapped(item: Any) -> Any:
        return function(item) if isinstance(item, kind) else item

    return replace(lost, **{field.name: tree_map(mapped, getattr(lost, field.name)) for field in fields(lost)})


def _arrive(store: weakref.ref[HostStore], index: int, _: Tensor) -> None:
    if (found := store()) is not None:
        found.arrive(index)
