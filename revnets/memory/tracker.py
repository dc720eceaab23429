"""Counts what a piece of code allocates and runs: bytes of tensor storages, operators, floating point operations.

`MemoryTracker` sees every operator that PyTorch dispatches, in the forward, inside of backward and inside of
saved-tensor hooks, and follows each storage from its first operator to its death by a weak reference. Nothing is
polled and no allocator is asked, so the numbers are exact to the byte, the same on every machine, and work for fake
and meta tensors as well, which have a size but no memory.

What it cannot see: workspaces inside of one kernel, tensors made outside of the dispatcher (a generator's state),
temporaries inside of a tensor subclass's own operators, and an allocator's rounding and fragmentation.
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
    """The counters at one moment."""

    label: str
    live: int  # bytes alive now
    peak: int  # most bytes alive at once since the snapshot before


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of storages that are created while it is active.

    A storage counts once, however many views look at it, with all of its bytes. What existed before (parameters,
    inputs) does not count unless it is registered. A storage that is resized counts from then on with its new size.
    The counters go on when the tracker is entered again, and storages that die in between are still noticed.

        with MemoryTracker() as tracker:
            loss = model(x).sum()
            kept = tracker.live
            loss.backward()
        tracker.peak

    Attributes:
        live: bytes alive now. Host memory (`revnets/engine/offload`) counts apart, in `host` and `host_peak`.
        peak: most bytes that were alive at once.
        snapshots: what `snapshot` noted, in order.
        label: set it to anything hashable, and what is created from then on counts under it as well.
        live_by_label: bytes alive now, by the label of their birth.
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
        self._resizes: list[Any] = []  # what `UntypedStorage.resize_` was before each `__enter__`

    def register(self, *values: Any) -> None:
        """Count what exists already: tensors, modules (parameters, buffers, gradients), optimizers, nests of them."""
        for value in values:
            for storage in _storages(_expand(value)):
                self._count(storage)

    def relabel(self, label: Hashable, *values: Any) -> None:
        """Count under another label what is counted of these: tensors, modules, optimizers, nests of them."""
        for storage in _storages(_expand(values)):
            known = self._counted.get(storage._cdata)
            if known is not None:
                self._add(known, sign=-1)
                self._counted[storage._cdata] = known._replace(label=label)
                self._add(self._counted[storage._cdata])

    def storages(self) -> set[int]:
        """Addresses of the storages that are counted and alive."""
        return set(self._counted)

    def snapshot(self, label: str) -> Snapshot:
        """Note the counters under a label; the snapshot's peak is the highest since the one before."""
        self.snapshots.append(Snapshot(label, self.live, self._since))
        self._since = self.live
        return self.snapshots[-1]

    def __enter__(self) -> MemoryTracker:
        # A storage can change its size without an operator (FSDP frees its gathered weights that way), and no hook
        # tells of it: the method itself has to.
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
        # `torch.tensor` makes its tensor in silence and shows it here, as an argument, for the first time.
        fresh = func is torch.ops.aten.lift_fresh.default
        for storage in _storages(result):
            if fresh or storage._cdata not in given:
                self._count(storage)
        for storage, size in given.values():
            if storage.nbytes() != size:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        """Begin to count a storage, or take note of its new size."""
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
    """A storage that is counted."""

    reference: weakref.ref
    size: int
    label: Hashable
    is_host: bool


class OpCounter(TorchDispatchMode):
    """Counts operators by name, the work of those that multiply matrices, and what all of them write.

        with OpCounter() as counter:
            model(x).sum().backward()
        counter.ops["aten.mm"], counter.matmuls, counter.flops

    Attributes:
        ops: calls by name without overload, such as `aten.mm`, `aten.convolution`, `aten.native_layer_norm`.
        matmuls: calls of products: matrix products, convolutions, attention kernels, and the backward of each.
        flops: floating point operations of those calls; a multiplication and an addition are two.
        written: bytes of the results of all operators but views.
        products: what each product took that `ReversibleColumns.products` counts, in order.
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
        """Operations and bytes in one number, which goes up and down as time does."""
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
    """A product of matrices, as `OpCounter` counts it."""

    nbytes: int  # of its results
    work: int  # that it takes
    end: int  # work that was done when it was over


FLOPS_PER_BYTE = 40
"""Operations of a matrix product in the time in which another operator writes a byte: a few dozen on most machines."""


@cache
def _is_view(func: Any) -> bool:
    returns = getattr(getattr(func, "_schema", None), "returns", ())  # higher-order operators have no schema
    return any(value.alias_info is not None and not value.alias_info.is_write for value in returns)


_DEVICE = torch.ops.prim.device.default
"""Fake tensors dispatch every question for their device: more than half of all calls, which make no tensor."""


def _device_of(tensor: Tensor) -> torch.device:
    """What the modes below would answer, without a dispatch to each: inside of a kernel, fake tensors are meta ones."""
    if not isinstance(tensor, FakeTensor):
        return _DEVICE(tensor)
    return torch.device("meta") if tensor.fake_mode.in_kernel_invocation else tensor.fake_device


_FLOPS = {
    **flop_registry,
    # PyTorch has no formula for its CPU kernel of attention; the arguments are those of the GPU's.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ],
}
"""Floating point operations of every operator that multiplies matrices."""


def kept_bytes(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Bytes alive between forward and backward because of the forward, its outputs included.

    Parameters, buffers and inputs existed before and do not count.
    """
    with MemoryTracker() as tracker:
        output = model(*args, **kwargs)
        gc.collect()  # a step that the forward simulated, for a plan, may be left in reference cycles
        kept = tracker.live
    del output
    return kept


def peak_bytes(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    """Most bytes alive at once in a forward and backward, gradients included, parameters and inputs not.

    The loss is the sum of all outputs. Gradients are taken for the parameters and for inputs that require them; no
    `.grad` is touched.
    """
    leaves = [tensor for tensor in tensors((list(model.parameters()), args, kwargs)) if tensor.requires_grad]
    with MemoryTracker() as tracker:
        outputs = [tensor for tensor in tensors(model(*args, **kwargs)) if tensor.requires_grad]
    ones = [torch.ones_like(output) for output in outputs]
    with tracker:
        torch.autograd.grad(outputs, leaves, ones, allow_unused=True)
    return tracker.peak


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)


def _expand(value: Any) -> Any:
    """Everything a module or an optimizer holds, as a nest of tensors; a nest remains one."""
    if isinstance(value, nn.Module):
        parameters = list(value.parameters())
        return [parameters, list(value.buffers()), [parameter.grad for parameter in parameters]]
    if isinstance(value, torch.optim.Optimizer):
        return list(value.state.values())
    if isinstance(value, (tuple, list)):
        return [_expand(item) for item in value]
    return value


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """The storages under a nest of tensors, those inside of sparse tensors and of subclasses included."""
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
"""How to reach the dense tensors of a sparse one."""
