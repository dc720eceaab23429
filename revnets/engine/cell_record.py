"""What a tape notes of one cell's call: tensors that it holds, and how x_{t-m} comes back."""

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
    """What a replayed tensor must have in common with the one it stands for."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Meta:
        stride = tensor.stride() if tensor.layout is torch.strided else ()  # not every sparse tensor has one
        return cls(tensor.shape, stride, tensor.dtype)


class Held(NamedTuple):
    """A detached state and the version at which the forward left it."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Held:
        return cls(tensor.detach(), tensor._version)

    def on_device(self) -> Held:
        """The state itself, as that of a `HostedTensor` comes back from the host."""
        return self


class LivenessToken:
    """Shared by the packed handles of one call of a cell and held by nothing else: it dies with the last of them."""

    __slots__ = ("__weakref__",)


class PackedHandle(NamedTuple):
    """What the graph holds in place of the k-th tensor that cell t saves."""

    tape: Tape
    t: int
    k: int
    liveness: LivenessToken


class CellRecord:
    """One cell's call in one pass."""

    def __init__(self, node: Node, mode: Memory):
        self.node = node
        self.mode = mode
        self.context: Any = None  # keyword arguments of the cell, with constants in place of tensors
        # x_{t-m}, in store and recompute, and where its lost bits take as much
        self.kept: Held | HostedTensor | None = None
        self.lost: lost_bits.LostBits | None = None  # what the inverse misses of it, in exact
        self.past_stride: tuple[int, ...] = ()
        self.past_grad = False
        self.grad_reads: list[bool] = []
        self.replay_context: ReplayContext | None = None
        self.metas: list[Meta] = []
        self.replayed: int | None = None  # so many tensors are packed into handles; the graph holds the others
        self.products: KeptProducts | None = None
        self.saved: dict[int, Held] = {}
        self.liveness: weakref.ref[object] | None = None  # to what the packed handles of this call share

    def keeping(self, cell: nn.Module, products: Collection[int]) -> AbstractContextManager[Any]:
        """A context for the cell's forward, in which the record takes the results of these products."""
        if not products:
            return nullcontext()
        from revnets.engine.replay.kept_products import KeptProducts  # few passes need it

        self.products = KeptProducts(cell, products)
        return self.products.recorded()

    def giving(self, name: str, cell: str) -> AbstractContextManager[Any]:
        """A context for the replay, in which it gives them; the arguments are those of `check_replay`."""
        return nullcontext() if self.products is None else self.products.given(name, cell)

    def settle(self) -> None:
        """Keep either x_{t-m} or its lost bits, where a device had to count the bits first."""
        if self.kept is not None and self.lost is not None:
            if self.lost.compact():
                self.kept = None
            else:
                self.lost = None

    def has_live_handles(self) -> bool:
        """Does a graph hold packed handles of this call?"""
        return self.liveness is not None and self.liveness() is not None

    def is_like(self, saved: Sequence[Held]) -> bool:
        """Are these as many tensors as the forward saved, and with the same metadata?"""
        if len(saved) != len(self.metas):
            return False
        return all(Meta.of(held.tensor) == meta for held, meta in zip(saved, self.metas, strict=True))


class AllCollected(Exception):
    """Ends a replay that has saved what the forward saved, as `torch.utils.checkpoint` does."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor among the arguments that every cell gets; it is handed to replays without its graph."""

    held: Held
    grad: bool

    @classmethod
    def of(cls, value: Any) -> Any:
        """An argument, or a nest of them (lists, tuples, dicts), with constants in place of its tensors."""

        def held(item: Any) -> Any:
            return cls(Held.of(item), item.requires_grad) if isinstance(item, Tensor) else item

        return tree_map(held, value)

    @classmethod
    def fresh(cls, value: Any) -> Any:
        """The argument for a replay."""

        def fresh(item: Any) -> Any:
            return item._tensor() if isinstance(item, cls) else item

        return tree_map(fresh, value)

    def _tensor(self) -> Tensor:
        return trusted(self.held, "an argument of the cells").detach().requires_grad_(self.grad)


def with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    """The tensor in memory laid out as `stride` says (Rule 4)."""
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def is_same_memory(one: Tensor, other: Tensor) -> bool:
    """Do both look at the same elements in the same way?"""
    if storage_key(one) != storage_key(other):
        return False
    return bool(one.storage_offset() == other.storage_offset()) and Meta.of(one) == Meta.of(other)


def is_unchanged(state: Tensor, coupled: Tensor, version: int) -> bool:
    return (state is coupled or is_same_memory(state, coupled)) and state._version == version


def trusted(held: Held, name: str) -> Tensor:
    if held.tensor._version != held.version:
        raise ReplayError(
            f"{name} was changed in place after the forward (version {held.tensor._version}, expected {held.version}), "
            "so backward cannot use it. Work on a copy: tensor.clone()",
            code="changed-in-place",
        )
    return held.tensor


def check_replay(record: CellRecord, saved: Sequence[Held], name: str, cell: str) -> None:
    """Make sure that a replay has saved what the forward saved (Rule 5).

    Args:
        name, cell: of the cell, as errors have it and as their attribute `cell`.

    Raises:
        ReplayError: another number of tensors, other shapes, strides or dtypes, or a tensor that was changed since.
    """
    causes = (
        "Usual causes: the cell takes another path in its replay (it counts its calls, looks at the clock, at "
        "Python's or NumPy's random numbers or at global state), or its input changed in place"
    )
    if len(saved) != len(record.metas):
        raise ReplayError(
            f"{name} saved {len(record.metas)} tensors in its forward and {len(saved)} in its replay. {causes}",
            cell=cell,
        )
    for k, (held, meta) in enumerate(zip(saved, record.metas, strict=True)):
        now = Meta.of(held.tensor)
        if now != meta:
            raise ReplayError(
                f"{name}: saved tensor {k} was {tuple(meta)} in the forward and is {tuple(now)} in the replay. "
                f"{causes}",
                cell=cell,
            )
        if held.tensor._version != held.version:
            raise ReplayError(
                f"{name}: saved tensor {k} of shape {tuple(now.shape)} is needed for the gradient, but the cell "
                "changes it in place later on. Use the out-of-place operation",
                code="changed-in-place",
                cell=cell,
            )
