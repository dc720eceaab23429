# pyright: reportUnknownMemberType=false
"""Results of matrix products that a cell keeps, so that its replay does not recompute them.

Products take most of a cell's time, and some results are small: the second product of an MLP takes as many FLOPs as the
first, but its result is a quarter of the size. So little memory saves much of a replay. PyTorch's selective activation
checkpointing (`torch.utils.checkpoint.create_selective_checkpoint_contexts`) uses the same idea with a policy per
operator. Here products are identified by their position in the call, and the planner selects them under a budget
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
from revnets.engine.torch_internals import is_compiled, modules_of, shared_version, storage_key, tree_leaves, tree_map

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
"""Operators that multiply matrices and return new tensors."""


def is_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operator is a matrix product. Attention with dropout is not: a replay must draw its random numbers."""
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
    """Return positions and names of the arguments that an operator changes; None if it has no schema."""
    schema = getattr(func, "_schema", None)  # higher-order operators have none
    if schema is None:
        return None
    arguments = enumerate(schema.arguments)
    return tuple((place, each.name) for place, each in arguments if each.alias_info and each.alias_info.is_write)


@cache
def _is_irrelevant(func: Any) -> bool:
    """Whether an operator neither multiplies matrices nor writes to an argument, as most do."""
    return func not in _PRODUCTS and _written_arguments(func) == ()


def _written_storages(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Return the storages that an operator changes. Version counters miss some, as with `.data` and in `nn.GRU`."""
    names = _written_arguments(func)
    values = (args, kwargs) if names is None else [args[k] if k < len(args) else kwargs.get(name) for k, name in names]
    return [storage_key(leaf) for leaf in tree_leaves(values) if _is_plain(leaf)]


class _Result(NamedTuple):
    """The result of a product, and the versions of its tensors at that time."""

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

    Results that the cell changes in place are recomputed in the replay, and so are sparse and distributed tensors.

    Args:
        cell: The called module.
        numbers: Positions of the products, from 0 in the order of the call.
    """

    def __init__(self, cell: nn.Module, numbers: Collection[int]):
        # Under a dispatch mode, Dynamo would run a compiled module eagerly.
        self._numbers = () if any(map(is_compiled, modules_of(cell))) else numbers
        self._results: dict[int, _Result] = {}

    def recorded(self) -> AbstractContextManager[Any]:
        """Return a context for the forward pass that records the results."""
        return _Recording(self._numbers, self._results) if self._numbers else nullcontext()

    def given(self, name: str, cell: str) -> AbstractContextManager[Any]:
        """Return a context for the replay that returns the recorded results instead of computing the products.

        Args:
            name: Description of the cell for error messages.
            cell: Name of the cell for the error's attribute `cell`.

        Raises:
            ReplayError: (from the body) the replay calls another product than the forward pass did.
        """
        results = {number: result for number, result in self._results.items() if result.is_unchanged}
        return _Giving(results, name, cell) if results else nullcontext()


class _Counting(TorchDispatchMode):
    """Numbers the products of a call."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The tape already runs without Dynamo, so PyTorch need not disable it again for every operator."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_irrelevant(func):
            return func(*args, **kwargs)
        if not is_product(func, args, kwargs):
            for storage in _written_storages(func, args, kwargs):
                self.written(storage)
            return func(*args, **kwargs)
        self._next += 1
        return self.product(self._next - 1, func, args, kwargs)

    def product(self, number: int, func: Any, args: Any, kwargs: Any) -> Any:
        """Return the result of product `number`."""
        raise NotImplementedError

    def written(self, storage: int) -> None:
        """Called before an operator changes this storage."""
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
                f"{self._name}: product {number} was {result.func} in the forward pass and is {func} in the replay. "
                "The cell takes another code path in its replay",
                cell=self._cell,
            )
        return tree_map(_alias, result.value)

    def written(self, storage: int) -> None:
        if storage in self._storages:
            raise ReplayError(
                f"{self._name} changes the result of a product in place in its replay, but not in its forward pass",
                cell=self._cell,
            )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_plain(value: Any) -> bool:
    """Whether the value is a strided tensor with its own storage, not a sparse or distributed one."""
    return _is_tensor(value) and value.layout is torch.strided and not is_traceable_wrapper_subclass(value)


def _alias(value: Any) -> Any:
    """Return a detached alias of a tensor that shares its version counter; other values unchanged."""
    if not isinstance(value, Tensor):
        return value
    with shared_version():
        return value.detach()


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(value) if _is_tensor(leaf)]
