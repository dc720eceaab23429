# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false, reportUnknownMemberType=false
"""What the engine needs of PyTorch that has no public name, in one place. Written for torch 2.7 and later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "FakeTensor",
    "buffers_of",
    "children_of",
    "has_values",
    "is_transformed",
    "parameters_of",
    "raise_compile_limits",
    "storage_key",
    "tree_leaves",
    "tree_map",
    "without_dynamo",
]

P = ParamSpec("P")
T = TypeVar("T")


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers; writing here puts another tensor in place of one."""
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own parameters. Plain tensors are among them under `functional_call`."""
    return cast("dict[str, Tensor | None]", module._parameters)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own submodules."""
    return module._modules


def has_values(tensor: Tensor) -> bool:
    """Is there something to compute with? Fake tensors and those on the meta device have shapes alone."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors that share their memory. `Tensor.is_set_to` does not know fake tensors."""
    return tensor.untyped_storage()._cdata


def is_transformed() -> bool:
    """Does something else than autograd's backward look at the operations? Export and torch.func know no hooks."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def without_dynamo(function: Callable[P, T]) -> Callable[P, T]:
    """As torch.compiler.disable, but does not import Dynamo, which takes a second, until it runs."""
    return torch._disable_dynamo()(function)


def raise_compile_limits(least: int) -> None:
    """Let Dynamo compile one function at least so many times. It counts by code, which all cells have in common."""
    limits = cast(Any, torch._dynamo).config
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(limits, name, max(getattr(limits, name), least))
