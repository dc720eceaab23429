# pyright: reportUnknownMemberType=false
"""Results of matrix products that a cell keeps, so that its replay does not compute them again.

Products take most of a cell's time, and the results of some are small: the second product of an MLP makes a quarter
of what the first one makes, for as many operations. So a few bytes save much of a replay. PyTorch's selective
activation checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`) has the same idea with a rule
for operators; here products are named by their number in the call, and the planner chooses them under a budget
(`revnets/memory/cell_options.py`).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from revnets.engine.errors import ReplayError
from revnets.engine.torch_internals import is_compiled, shared_version, storage_key, tree_leaves, tree_map

_PRODUCTS = frozenset(
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
"""Operators that multiply matrices and make new tensors."""


def is_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Does an operator multiply matrices? Attention with dropout does not count: a replay must draw its numbers."""
    if func not in _PRODUCTS:
        return False
    place = _place_of_dropout(func)
    return place is None or not (args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))


@cache
def _place_of_dropout(func: Any) -> int | None:
    names = [argument.name for argument in func._schema.arguments]
    return names.index("dropout_p") if "dropout_p" in names else None


@cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...] | None:
    """Places and names of the arguments that an operator changes; None where it does not say."""
    schema = getattr(func, "_schema", None)  # which higher-order operators have not
    if schema is None:
        return None
    arguments = enumerate(schema.arguments)
    return tuple((place, each.name) for place, each in arguments if each.alias_info and each.alias_info.is_write)


def _written_storages(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The memory that an operator changes. Version counters miss some of it, as that of `.data` and of `nn.GRU`."""
    names = _written_arguments(func)
    values = (args, kwargs) if names is None else [args[k] if k < len(args) else kwargs.get(name) for k, name in names]
    return [storage_key(leaf) for leaf in tree_leaves(values) if _is_plain(leaf)]


class _Result(NamedTuple):
    """What a product returned, and the versions of its tensors at that time."""

    func: Any
    value: Any
    versions: list[int]

    @classmethod
    def of(cls, func: Any, value: Any) -> _Result:
        value = tree_map(_alias, value)
        return cls(func, value, _versions(value))

    @property
    def is_unchanged(self) -> bool:
        return _versions(self.value) == self.versions


class KeptProducts:
    """The results that one call of a cell keeps.

    A result whose memory the cell changes in place is computed again in the replay, as without this class, and so are
    sparse and distributed tensors.

    Args:
        cell: is called.
        numbers: of the products, from 0 in the order of the call.
    """

    def __init__(self, cell: nn.Module, numbers: Collection[int]):
        # A dispatch mode would make Dynamo run a compiled module as it is written.
        self._numbers = () if any(map(is_compiled, cell.modules())) else numbers
        self._results: dict[int, _Result] = {}

    def recorded(self) -> AbstractContextManager[Any]:
        """A context for the forward, which takes the results."""
        return _Recording(self._numbers, self._results) if self._numbers else nullcontext()

    def given(self, name: str, cell: str) -> AbstractContextManager[Any]:
        """A context for the replay, which gives the results in place of the products.

        Args:
            name, cell: of the cell, as errors have it and as their attribute `cell`.

        Raises:
            ReplayError: (from the body) the replay calls another product than the forward did.
        """
        results = {number: result for number, result in self._results.items() if result.is_unchanged}
        return _Giving(results, name, cell) if results else nullcontext()


class _Counting(TorchDispatchMode):
    """Numbers the products of a call."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_product(func, args, kwargs):
            for storage in _written_storages(func, args, kwargs):
                self.written(storage)
            return func(*args, **kwargs)
        self._next += 1
        return self.product(self._next - 1, func, args, kwargs)

    def product(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError

    def written(self, storage: int) -> None:
        """An operator is about to change this memory."""
        raise NotImplementedError


class _Recording(_Counting):
    def __init__(self, numbers: Collection[int], results: dict[int, _Result]):
        super().__init__()
        self._numbers, self._results = numbers, results
        self._number_of: dict[int, int] = {}  # of the product that made a storage

    def product(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        value = func(*args, **kwargs)
        if number in self._numbers and all(map(_is_plain, filter(_is_tensor, tree_leaves(value)))):
            self._results[number] = result = _Result.of(func, value)
            self._number_of |= {storage_key(leaf): number for leaf in tree_leaves(result.value) if _is_tensor(leaf)}
        return value

    def written(self, storage: int) -> None:
        if storage in self._number_of:
            self._results.pop(self._number_of[storage], None)

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        changed = [number for number, result in self._results.items() if not result.is_unchanged]
        for number in changed:
            del self._results[number]


class _Giving(_Counting):
    def __init__(self, results: dict[int, _Result], name: str, cell: str):
        super().__init__()
        self._results, self._name, self._cell = results, name, cell
        values = [result.value for result in results.values()]
        self._storages = {storage_key(leaf) for leaf in tree_leaves(values) if _is_tensor(leaf)}

    def product(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        result = self._results.get(number)
        if result is None:
            return func(*args, **kwargs)
        if result.func is not func:
            raise ReplayError(
                f"{self._name}: product {number} was {result.func} in the forward and is {func} in the replay. The "
                "cell takes another path in its replay",
                cell=self._cell,
            )
        return tree_map(_alias, result.value)

    def written(self, storage: int) -> None:
        if storage in self._storages:
            raise ReplayError(
                f"{self._name} changes the result of a product in place in its replay, and did not in its forward",
                cell=self._cell,
            )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_plain(value: Any) -> bool:
    """Is it a tensor with memory of its own? Sparse and distributed tensors have none."""
    return _is_tensor(value) and value.layout is torch.strided and not is_traceable_wrapper_subclass(value)


def _alias(value: Any) -> Any:
    """The same memory as another tensor without a graph; the two count their versions together."""
    if not isinstance(value, Tensor):
        return value
    with shared_version():
        return value.detach()


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if _is_tensor(leaf)]
