"""Tensors in host memory, which are on their device only while backward needs them."""

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
    """Host memory for the bytes of a storage on a device.

    Args:
        source: Any tensor with this storage. The constructor does not copy its bytes.
        name: Description of the content, for error messages.
        lock: Of the store; autograd runs one thread per device.

    Attributes:
        buffer: The bytes (uint8) in host memory.
        fetched: The bytes on the device, or None; the copy may not have finished.
        is_changed: Whether the source was changed in place before its copy finished.
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
        """Return the bytes (uint8), for use on the current stream."""
        if self.is_changed:
            raise ReplayError(
                f"{self.name} was changed in place after it was saved for backward, before its copy to host memory "
                "finished. Modify a copy: tensor.clone()",
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
        """Note a transfer that writes the bytes to `fetched` on the device."""
        self.fetched, self._arriving = fetched, transfer

    def release(self) -> None:
        """Free the bytes on the device."""
        with self._lock:
            self.fetched = self._arriving = None


def fetch_storages(storages: Iterable[HostedStorage]) -> None:
    """Start to copy storages to their device, except those that are already there."""
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
        """Return the tensor on its device, with its original shape, strides and dtype."""
        content = self._storage.bytes_on_device()
        whole = content[: content.numel() // self._dtype.itemsize * self._dtype.itemsize]
        return whole.view(self._dtype).as_strided(self._shape, self._stride, self._offset)

    def on_device(self) -> Held:
        """Return the tensor on its device, as a tape holds it."""
        return Held.of(self.tensor())


def bytes_of(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor's storage without a copy, up to the last whole element."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((count,), (1,), 0).view(torch.uint8)
