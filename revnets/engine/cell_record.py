"""What a tape records of one call of a cell: the tensors that it holds, and how to recover x_{t-m}."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from revnets.engine import lost_bits
from revnets.engine.errors import ReplayError
from revnets.engine.graph import Node
from revnets.engine.memory_mode import Memory
from revnets.engine.replay.replay_context import ReplayContext
from revnets.engine.torch_internals import storage_key, tree_map

if TYPE_CHECKING:
    from revnets.engine.offload.hosted_tensors import HostedTensor
    from revnets.engine.replay.kept_products import KeptProducts
    from revnets.engine.tape import Tape


class Meta(NamedTuple):
    """Metadata that a replayed tensor must share with the original."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Meta:
        stride = tensor.stride() if tensor.layout is torch.strided else ()  # not every sparse tensor has one
        return cls(tensor.shape, stride, tensor.dtype)


class Held(NamedTuple):
    """A detached tensor and its version at the end of the forward pass."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Held:
        return cls(tensor.detach(), tensor._version)

    def on_device(self) -> Held:
        """Return itself; `HostedTensor` has the same method."""
        return self


class LivenessToken:
    """Shared only by the packed handles of one call of a cell, so it is freed with the last of them."""

    __slots__ = ("__weakref__",)


class PackedHandle(NamedTuple):
    """What the graph holds instead of the k-th tensor that cell t saves."""

    tape: Tape
    t: int
    k: int
    liveness: LivenessToken


class CellRecord:
    """One call of a cell in one pass."""

    def __init__(self, node: Node, mode: Memory):
        self.node = node
        self.mode = mode
        self.context: Any = None  # keyword arguments of the cell, with `Constant` instead of tensors
        # x_{t-m}, in store and recompute, and in exact if its lost bits are no smaller
        self.kept: Held | HostedTensor | None = None
        self.lost: lost_bits.LostBits | None = None  # what the inverse lacks, in exact
        self.past_stride: tuple[int, ...] = ()
        self.past_grad = False
        self.grad_reads: list[bool] = []
        self.replay_context: ReplayContext | None = None
        self.metas: list[Meta] = []
        self.replayed: int | None = None  # number of tensors packed into handles; the graph holds the others
        self.products: KeptProducts | None = None
        self.saved: dict[int, Held] = {}
        self.liveness: weakref.ref[object] | None = None  # to the token of this call's packed handles

    def keeping(self, cell: nn.Module, products: Collection[int]) -> AbstractContextManager[Any]:
        """Return a context for the forward pass that records the results of these products."""
        if not products:
            return nullcontext()
        from revnets.engine.replay.kept_products import KeptProducts  # rarely needed

        self.products = KeptProducts(cell, products)
        return self.products.recorded()

    def giving(self, name: str, cell: str) -> AbstractContextManager[Any]:
        """Return a context for the replay that supplies the recorded results; arguments as in `check_replay`."""
        return nullcontext() if self.products is None else self.products.given(name, cell)

    def settle(self) -> None:
        """Keep either x_{t-m} or its lost bits, once the device has counted the bits."""
        if self.kept is not None and self.lost is not None:
            if self.lost.compact():
                self.kept = None
            else:
                self.lost = None

    def has_live_handles(self) -> bool:
        """Whether a graph holds packed handles of this call."""
        return self.liveness is not None and self.liveness() is not None

    def is_like(self, saved: Sequence[Held]) -> bool:
        """Whether these tensors match those of the forward pass in number and metadata."""
        if len(saved) != len(self.metas):
            return False
        return all(Meta.of(held.tensor) == meta for held, meta in zip(saved, self.metas, strict=True))


class AllCollected(Exception):
    """Ends a replay that has saved everything, as in `torch.utils.checkpoint`."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor among the keyword arguments of cells. Replays receive it without its graph."""

    held: Held
    grad: bool

    @classmethod
    def of(cls, value: Any) -> Any:
        """Replace the tensors in an argument (nested lists, tuples, dicts) by constants."""

        def held(item: Any) -> Any:
            return cls(Held.of(item), item.requires_grad) if isinstance(item, Tensor) else item

        return tree_map(held, value)

    @classmethod
    def fresh(cls, value: Any) -> Any:
        """Return the argument for a replay, with tensors instead of constants."""

        def fresh(item: Any) -> Any:
            return item._tensor() if isinstance(item, cls) else item

        return tree_map(fresh, value)

    def _tensor(self) -> Tensor:
        return trusted(self.held, "an argument of the cells").detach().requires_grad_(self.grad)


def with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return the tensor, copied if its strides differ (Rule 4)."""
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether both tensors are the same view of the same memory."""
    if storage_key(one) != storage_key(other):
        return False
    return bool(one.storage_offset() == other.storage_offset()) and Meta.of(one) == Meta.of(other)


def is_unchanged(state: Tensor, coupled: Tensor, version: int) -> bool:
    """Whether `state` is the tensor `coupled`, at this version."""
    return (state is coupled or is_same_memory(state, coupled)) and state._version == version


def trusted(held: Held, name: str) -> Tensor:
    """Return the tensor; raise a `ReplayError` if it was changed in place after the forward pass (Rule 6)."""
    if held.tensor._version != held.version:
        raise ReplayError(
            f"{name} was changed in place after the forward pass (version {held.tensor._version}, expected "
            f"{held.version}), so backward cannot use it. Modify a copy: tensor.clone()",
            code="changed-in-place",
        )
    return held.tensor


def check_replay(record: CellRecord, saved: Sequence[Held], name: str, cell: str) -> None:
    """Check that a replay saved the same tensors as the forward pass (Rule 5).

    Args:
        record: Of the replayed cell.
        saved: Tensors that the replay saved.
        name: Description of the cell for the message.
        cell: Name of the cell for the error's attribute `cell`.

    Raises:
        ReplayError: If the number, a shape, strides or a dtype differ, or a tensor was changed since.
    """
    causes = (
        "Usual causes: the cell takes another code path in its replay (it depends on a call counter, the clock, random "
        "numbers of Python or NumPy, or global state), or its input was changed in place"
    )
    if len(saved) != len(record.metas):
        raise ReplayError(
            f"{name} saved {len(record.metas)} tensors in its forward pass and {len(saved)} in its replay. {causes}",
            cell=cell,
        )
    for k, (held, meta) in enumerate(zip(saved, record.metas, strict=True)):
        now = Meta.of(held.tensor)
        if now != meta:
            raise ReplayError(
                f"{name}: saved tensor {k} was {tuple(meta)} in the forward pass and is {tuple(now)} in the replay. "
                f"{causes}",
                cell=cell,
            )
        if held.tensor._version != held.version:
            raise ReplayError(
                f"{name}: saved tensor {k} of shape {tuple(now.shape)} is needed for the gradient, but the cell "
                "changes it in place afterwards. Use the out-of-place operation",
                code="changed-in-place",
                cell=cell,
            )
