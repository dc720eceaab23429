"""What the cells of one pass keep in host memory: lost bits, states, and saved tensors of stored cells.

Forward: after the call of a cell, what it keeps is copied to the host. The device memory is freed after the call of the
next cell, so the copy can overlap with that call. Backward: when it reaches a cell, the copy of what the previous cell
keeps starts.

Each storage is copied once, for all views that a cell keeps. A storage stays on the device if it is there anyway
(parameters, buffers, the stem, arguments of cells), if sharded training has emptied it, or if it is small.
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
"""Bytes of a storage below which a copy does not pay off."""


class OffloadedTensor:
    """What the graph holds instead of a saved tensor that no replay restores."""

    __slots__ = ("__weakref__", "_store", "place")

    def __init__(self, tensor: Tensor, store: HostStore):
        self.place: Held | HostedTensor = Held.of(tensor)
        self._store = store  # keeps the store alive

    def on_device(self) -> Held:
        """Return the tensor on its device."""
        self._store.settle()  # states without a hook do not notify the store
        return self.place.on_device()


class HostStore:
    """Host memory of one pass.

    Args:
        cells: Indices of the cells that use it.
        stem: Stays on the device, because any cell may read it.
    """

    def __init__(self, cells: Collection[int], stem: Tensor):
        self.cells = cells
        self._stem = storage_key(stem)
        self._is_replayed = False  # whether any cell so far will be replayed
        self._saved: list[weakref.ref[OffloadedTensor]] = []  # by the current call
        self._storages: dict[int, list[weakref.ref[HostedStorage]]] = defaultdict(list)  # by the index of the cell
        self._outgoing: list[OutgoingCopies] = []
        self._pending: set[int] = set()  # cells whose lost bits are not compacted yet
        self._lock = threading.RLock()

    # ---------------------------------------------------------------- forward

    def saved(self, index: int, tensor: Tensor) -> Held | OffloadedTensor:
        """Return what the graph holds instead of a tensor that autograd saves in a cell."""
        if index not in self.cells:
            return Held.of(tensor)
        saved = OffloadedTensor(tensor, self)
        self._saved.append(weakref.ref(saved))
        return saved

    def send(self, record: CellRecord, cell: nn.Module, name: str, state: Tensor) -> None:
        """Start to copy what a cell keeps, after its call, and free what the previous cell kept on the device.

        Args:
            record: Of the call.
            cell: The called module.
            name: Name of the cell in error messages.
            state: x_t.
        """
        index = record.node.index
        self.settle()
        self._is_replayed = self._is_replayed or record.mode is not Memory.STORE
        if not self._is_replayed:
            record.kept = None  # backward of stored cells needs no state, and no earlier cell is replayed
        is_passed_through = state.is_leaf or storage_key(state) == self._stem  # and keeps its hooks after this pass
        if state.requires_grad and not is_passed_through:  # its gradient is computed when backward reaches the cell
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
        """Start to copy what a cell keeps, once the device has counted its lost bits (`CellRecord.settle`)."""
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
        """Free the device memory of started copies once they have finished."""
        with self._lock:
            for copies in self._outgoing:
                copies.end()
            self._outgoing.clear()

    # --------------------------------------------------------------- backward

    def lost_bits_of(self, record: CellRecord) -> LostBits | None:
        """Return the lost bits of a cell, on the device."""
        self.settle()
        return None if record.lost is None else _mapped(record.lost, HostedTensor, HostedTensor.tensor)

    def arrive(self, index: int) -> None:
        """Fetch what this cell and the one below keep, when backward reaches the cell, and release what is above."""
        self.settle()
        with self._lock:
            for cell in self._storages:
                if cell > index + 1:  # the replay of this cell may need a state of the cell above
                    for storage in self._alive(cell):
                        storage.release()
            for cell in (index, index - 1):
                fetch_storages(self._alive(cell))

    def _alive(self, cell: int) -> list[HostedStorage]:
        found = (reference() for reference in self._storages.get(cell, ()))
        return [storage for storage in found if storage is not None]


class OutgoingCopies:
    """Copies to the host of what one cell keeps.

    Args:
        name: Description of what is copied, for error messages.
        resident: Keys of storages that stay on the device.
        lock: Of the store; autograd runs one thread per device.
    """

    def __init__(self, name: str, resident: Collection[int], lock: threading.RLock):
        self.name = name
        self.storages: dict[int, HostedStorage] = {}
        self._resident = resident
        self._lock = lock
        self._sources: list[tuple[Held, HostedStorage]] = []
        self._transfers: list[Transfer] = []

    def add(self, held: Held) -> None:
        """Add the storage of this tensor to the copies, unless it stays on the device."""
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
        """Yield each storage once, with its tensor of the smallest elements, which cover all of its bytes."""
        for storage in self.storages.values():
            tensors = [held.tensor for held, of in self._sources if of is storage]
            yield storage, min(tensors, key=Tensor.element_size)

    def end(self) -> None:
        """Make the current stream wait for the copies, and free what was copied."""
        for transfer in self._transfers:
            transfer.wait()
        self._note_changes()
        self._sources.clear()

    def _note_changes(self) -> None:
        for held, storage in self._sources:
            storage.is_changed = storage.is_changed or held.tensor._version != held.version

    def hosted(self, tensor: Tensor) -> Tensor | HostedTensor:
        """Return the hosted tensor of an added tensor, or the tensor itself if it stays on the device."""
        storage = self.storages.get(storage_key(tensor)) if is_plain(tensor) else None
        return tensor if storage is None else HostedTensor(tensor, storage)

    def place(self, held: Held | HostedTensor) -> Held | HostedTensor:
        """Like `hosted`, for a tensor that the tape holds."""
        hosted = self.hosted(held.tensor) if isinstance(held, Held) else held
        return hosted if isinstance(hosted, HostedTensor) else held


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor is a plain strided view of its storage, with values."""
    known = type(tensor) in (Tensor, nn.Parameter, FakeTensor) and tensor.layout is torch.strided
    return known and not (tensor.is_meta or tensor.is_conj() or tensor.is_neg())


def _storages_of(cell: nn.Module) -> set[int]:
    return {storage_key(tensor) for tensor in (*cell.parameters(), *cell.buffers()) if is_plain(tensor)}


def _storages_of_constants(context: Any) -> set[int]:
    constants = (item.held.tensor for item in tree_leaves(context) if isinstance(item, Constant))
    return {storage_key(tensor) for tensor in constants if is_plain(tensor)}


def _mapped(lost: LostBits, kind: type, function: Callable[[Any], Any]) -> LostBits:
    """Return lost bits with `function` applied to every item of type `kind`."""

    def mapped(item: Any) -> Any:
        return function(item) if isinstance(item, kind) else item

    return replace(lost, **{field.name: tree_map(mapped, getattr(lost, field.name)) for field in fields(lost)})


def _arrive(store: weakref.ref[HostStore], index: int, _: Tensor) -> None:
    if (found := store()) is not None:
        found.arrive(index)
