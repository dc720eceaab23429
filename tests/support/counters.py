"""Counters of matrix products, kept tensors and synchronizations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.gradients import MATMULS, WAITS


class Matmuls(TorchDispatchMode):
    """Counts matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.count += name in MATMULS or "scaled_dot_product" in name
        return func(*args, **(kwargs or {}))


class Kept(TorchDispatchMode):
    """Records every storage that is created under it, without keeping any alive.

    Args:
        peak: Whether to update `highest`, the most bytes alive at once.
    """

    def __init__(self, peak: bool = False):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = peak
        self.highest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        taken = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        known = {value.untyped_storage()._cdata for value in taken}
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in known:  # neither a view nor in place
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self.peak:
            self.highest = max(self.highest, self.bytes())
        return result

    def bytes(self) -> int:
        """Bytes of the storages that are still alive."""
        self.storages = {key: held for key, held in self.storages.items() if not held[0].expired()}
        return sum(nbytes for _, nbytes in self.storages.values())


class Watch(TorchDispatchMode):
    """Records operators after which the host waits for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(item, Tensor) and item.dtype == torch.bool for item in (args[1] if len(args) > 1 else None) or ()
        )
        if name in WAITS or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))
