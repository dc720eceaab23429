"""Counters for the code that runs under them: bytes of tensor storages, operators and floating point operations.

`MemoryTracker` sees every operator that PyTorch dispatches, in forward, in backward and in saved-tensor hooks. It
follows each storage from the operator that creates it until a weak reference reports that it was freed. It neither
polls nor queries an allocator, so the numbers are exact to the byte and equal on every machine. Fake and meta tensors,
which have a size but no memory, count in the same way.

Not counted: workspaces of a kernel, tensors created outside the dispatcher (the state of a generator), temporaries
inside the operators of a tensor subclass, and rounding and fragmentation of an allocator.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils.flop_counter import flop_registry

from revnets.engine.offload.transfers import is_host_allocation, is_transferring
from revnets.engine.replay.kept_products import is_product


class Snapshot(NamedTuple):
    """The counters at one moment.

    Attributes:
        label: Label that was passed to `MemoryTracker.snapshot`.
        live: Bytes alive at this moment.
        peak: Most bytes alive at once since the previous snapshot.
    """

    label: str
    live: int
    peak: int


class MemoryTracker(TorchDispatchMode):
    """Count the bytes of storages that are created while the tracker is active.

    A storage counts once, with all of its bytes, however many views share it. Storages that existed before
    (parameters, inputs) do not count unless they are registered. A resized storage counts with its new size. The
    counters continue when the tracker is entered again. Storages that are freed in between are still subtracted.

    Example:
        ```python
        with MemoryTracker() as tracker:
            loss = model(x).sum()
            kept = tracker.live
            loss.backward()
        print(kept, tracker.peak)
        ```

    Attributes:
        live: Bytes alive now, without host memory (`revnets/engine/offload`).
        peak: Most bytes alive at once, without host memory.
        host: Bytes alive in host memory now.
        host_peak: Most bytes alive in host memory at once.
        snapshots: Results of `snapshot`, in order.
        label: Any hashable value. Storages created from now on also count under this label.
        live_by_label: Bytes alive now, by the label at their creation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self.host = 0
        self.host_peak = 0
        self.snapshots: list[Snapshot] = []
        self.label: Hashable = None
        self.live_by_label: Counter[Hashable] = Counter()
        self._since = 0  # peak since the last snapshot
        self._counted: dict[int, _Counted] = {}  # by address
        self._resizes: list[Any] = []  # `UntypedStorage.resize_` before each `__enter__`

    def register(self, *values: Any) -> None:
        """Count existing tensors, modules (parameters, buffers, gradients), optimizers, or containers of them."""
        for value in values:
            for storage in _storages(_expand(value)):
                self._count(storage)

    def relabel(self, label: Hashable, *values: Any) -> None:
        """Move counted storages to another label: those of tensors, modules, optimizers or containers of them."""
        for storage in _storages(_expand(values)):
            known = self._counted.get(storage._cdata)
            if known is not None:
                self._add(known, sign=-1)
                self._counted[storage._cdata] = known._replace(label=label)
                self._add(self._counted[storage._cdata])

    def storages(self) -> set[int]:
        """Return the addresses of the counted storages that are alive."""
        return set(self._counted)

    def snapshot(self, label: str) -> Snapshot:
        """Record the counters under a label. The peak is the highest since the previous snapshot."""
        self.snapshots.append(Snapshot(label, self.live, self._since))
        self._since = self.live
        return self.snapshots[-1]

    def __enter__(self) -> MemoryTracker:
        # A storage can change its size without an operator (FSDP frees gathered weights that way), and there is no
        # hook for it. So the method itself is replaced.
        original = torch.UntypedStorage.resize_
        self._resizes.append(original)

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            result = original(storage, size)
            self._count(storage)
            return result

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resizes.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _DEVICE:
            return _device_of(*args)
        given = {storage._cdata: (storage, storage.nbytes()) for storage in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        # `torch.tensor` creates its tensor outside the dispatcher; it first appears here, as an argument.
        fresh = func is torch.ops.aten.lift_fresh.default
        for storage in _storages(result):
            if fresh or storage._cdata not in given:
                self._count(storage)
        for storage, size in given.values():
            if storage.nbytes() != size:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Begin to count a storage, or update its size."""
        key, size = storage._cdata, storage.nbytes()
        known = self._counted.get(key)
        if known is None:
            reference = weakref.ref(storage, lambda _: self._add(self._counted.pop(key), sign=-1))
            known = _Counted(reference, 0, self.label, is_host_allocation())
        else:
            self._add(known, sign=-1)
        self._counted[key] = known._replace(size=size)
        self._add(self._counted[key])
        self.peak = max(self.peak, self.live)
        self.host_peak = max(self.host_peak, self.host)
        self._since = max(self._since, self.live)

    def _add(self, counted: _Counted, sign: int = 1) -> None:
        if counted.is_host:
            self.host += sign * counted.size
            return
        self.live += sign * counted.size
        self.live_by_label[counted.label] += sign * counted.size


class _Counted(NamedTuple):
    """A counted storage."""

    reference: weakref.ref
    size: int
    label: Hashable
    is_host: bool


class OpCounter(TorchDispatchMode):
    """Count operators by name, the FLOPs of matrix products, and the bytes that all operators write.

    Example:
        ```python
        with OpCounter() as counter:
            model(x).sum().backward()
        print(counter.ops["aten.mm"], counter.matmuls, counter.flops)
        ```

    Attributes:
        ops: Calls by operator name without overload, such as `aten.mm`, `aten.convolution`, `aten.native_layer_norm`.
        matmuls: Calls of matrix products, convolutions and attention kernels, forward and backward.
        flops: Floating point operations of these calls. A multiplication and an addition count as two.
        written: Bytes of the results of all operators except views.
        products: Each matrix product that `ReversibleColumns.products` numbers, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.matmuls = 0
        self.flops = 0
        self.written = 0
        self.products: list[Product] = []

    @property
    def work(self) -> int:
        """Compute cost: FLOPs and bytes written in one number, as an estimate of relative time."""
        return self.flops + FLOPS_PER_BYTE * self.written

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _DEVICE:
            return _device_of(*args)
        before = self.work
        result = func(*args, **kwargs)
        op = getattr(func, "overloadpacket", func)  # higher-order operators have no overloads
        if getattr(func, "namespace", None) != "prim":
            self.ops[str(op)] += 1
        if op in _FLOPS:
            self.matmuls += 1
            self.flops += _FLOPS[op](*args, **kwargs, out_val=result)
        if not (_is_view(func) or is_transferring()):
            self.written += sum(tensor.nbytes for tensor in tensors(result))
        if is_product(func, args, kwargs):
            nbytes = sum(tensor.nbytes for tensor in tensors(result))
            self.products.append(Product(nbytes, self.work - before, self.work))
        return result


class Product(NamedTuple):
    """A matrix product that `OpCounter` has counted."""

    nbytes: int  # bytes of its results
    work: int  # compute cost of the product
    end: int  # value of `OpCounter.work` after the product


FLOPS_PER_BYTE = 40
"""FLOPs of a matrix product in the time in which another operator writes one byte: a few dozen on most machines."""


@cache
def _is_view(func: Any) -> bool:
    returns = getattr(getattr(func, "_schema", None), "returns", ())  # higher-order operators have no schema
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


_DEVICE = torch.ops.prim.device.default
"""Fake tensors dispatch every access to their device: more than half of all calls, none of which creates a tensor."""


def _device_of(tensor: Tensor) -> torch.device:
    """Return the device without dispatching to the modes below. Inside a kernel, fake tensors are meta tensors."""
    if not isinstance(tensor, FakeTensor):
        return _DEVICE(tensor)
    return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device


_FLOPS = {
    **flop_registry,
    # PyTorch has no formula for its CPU attention kernel, which takes the same arguments as the GPU kernel.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}
"""Formulas for the FLOPs of every operator that multiplies matrices."""


def kept_bytes(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Return the bytes that `model(*args, **kwargs)` leaves alive for backward, outputs included.

    Parameters, buffers and inputs do not count.
    """
    with MemoryTracker() as tracker:
        output = model(*args, **kwargs)
        gc.collect()  # if the forward pass simulated a step for a plan, reference cycles may keep its tensors
        kept = tracker.live
    del output
    return kept


def peak_bytes(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Return the most bytes alive at once in `model(*args, **kwargs)` and backward, without parameters and inputs.

    The loss is the sum of all outputs. Gradients of parameters and of inputs that require them count.
    """
    leaves = [tensor for tensor in tensors((list(model.parameters()), args, kwargs)) if tensor.requires_grad]
    with MemoryTracker() as tracker:
        outputs = [tensor for tensor in tensors(model(*args, **kwargs)) if tensor.requires_grad]
    ones = [torch.ones_like(output) for output in outputs]
    with tracker:
        torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
    return tracker.peak


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)


def _expand(value: Any) -> Any:
    """Replace modules and optimizers in a nested container by lists of their tensors."""
    if isinstance(value, nn.Module):
        parameters = list(value.parameters())
        return [parameters, list(value.buffers()), [parameter.grad for parameter in parameters]]
    if isinstance(value, torch.optim.Optimizer):
        return list(value.state.values())
    if isinstance(value, (tuple, list)):
        return [_expand(item) for item in value]
    return value


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of nested tensors, including those inside sparse tensors and tensor subclasses."""
    if isinstance(value, Tensor):
        if is_traceable_wrapper_subclass(value):
            names, _ = value.__tensor_flatten__()
            for name in names:
                yield from _storages(getattr(value, name))
        elif value.layout is torch.strided:
            yield value.untyped_storage()
        else:
            for part in _SPARSE_PARTS.get(value.layout, ()):
                yield from _storages(getattr(value, part)())
    elif isinstance(value, torch.UntypedStorage):
        yield value
    elif isinstance(value, torch.TypedStorage):
        yield value._untyped_storage
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _storages(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _storages(item)


_SPARSE_PARTS = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
"""Methods that return the dense parts of a sparse tensor, by layout."""
