"""Tensors whose bytes are in host memory, and on their device only while backward needs them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from revnets.engine.cell_record import Held
from revnets.engine.errors import ReplayError
from revnets.engine.offload.transfers import Transfer, has_streams, host_empty, transferring
from revnets.engine.torch_internals import without_transforms


class HostedStorage:
    """The bytes of a storage of a device in host memory.

    Args:
        source: any tensor with this storage. Its bytes are not copied here.
        name: of what is in it, for an error.
        lock: autograd runs one thread a device.

    Attributes:
        buffer: the bytes (uint8) in host memory.
        fetched: the bytes on the device, or None; perhaps still on their way.
        is_changed: was the source changed in place before its copy was over?
    """

    __slots__ = ("__weakref__", "_arriving", "_lock", "buffer", "device", "fetched", "is_changed", "name")

    def __init__(self, source: Tensor, name: str, lock: threading.RLock):
        self.buffer = host_empty(source.untyped_storage().nbytes(), pinned=has_streams(source.device))
        self.device = source.device
        self.name = name
        self.is_changed = False
        self._lock = lock
        self.fetched: Tensor | None = None
        self._arriving: Transfer | None = None

    def bytes_on_device(self) -> Tensor:
        """The bytes (uint8), for use on the present stream."""
        if self.is_changed:
            raise ReplayError(
                f"{self.name} was changed in place after it was saved for backward, before its copy was in host "
                "memory. Work on a copy: tensor.clone()",
                code="changed-in-place",
            )
        with self._lock:
            fetch_storages([self])
            if self._arriving is not None:
                self._arriving.wait()
                self._arriving = None
            assert self.fetched is not None
            return self.fetched

    def arrive_by(self, transfer: Transfer, fetched: Tensor) -> None:
        """Expect the bytes on the device."""
        self.fetched, self._arriving = fetched, transfer

    def release(self) -> None:
        """Let go of the bytes on the device."""
        with self._lock:
            self.fetched = self._arriving = None


def fetch_storages(storages: Iterable[HostedStorage]) -> None:
    """Start to copy storages to their device, where they are not there yet."""
    absent: dict[torch.device, list[HostedStorage]] = defaultdict(list)
    for storage in storages:
        if storage.fetched is None:
            absent[storage.device].append(storage)
    with without_transforms():
        for device, found in absent.items():
            with transferring():
                copies = [(torch.empty_like(storage.buffer, device=device), storage.buffer) for storage in found]
            transfer = Transfer(device, copies)
            for storage, (fetched, _) in zip(found, copies, strict=True):
                storage.arrive_by(transfer, fetched)


class HostedTensor:
    """A view of a hosted storage."""

    __slots__ = ("_dtype", "_offset", "_shape", "_storage", "_stride")

    def __init__(self, tensor: Tensor, storage: HostedStorage):
        self._storage = storage
        self._dtype, self._shape = tensor.dtype, tensor.shape
        self._stride, self._offset = tensor.stride(), tensor.storage_offset()

    def tensor(self) -> Tensor:
        """The tensor on its device, with the shape, strides and dtype that it had."""
        found = self._storage.bytes_on_device()
        whole = found[: found.numel() // self._dtype.itemsize * self._dtype.itemsize]
        return whole.view(self._dtype).as_strided(self._shape, self._stride, self._offset)

    def on_device(self) -> Held:
        """The tensor as a tape holds it."""
        return Held.of(self.tensor())


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of the storage of a tensor, shared with it; without those at the end that make no whole element."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0).view(torch.uint8)
