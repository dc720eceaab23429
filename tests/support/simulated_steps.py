"""Cache of simulated steps: many tests of a module plan the same model for different budgets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
from pydantic import BaseModel
from torch import Tensor, nn

from revnets.memory import planner
from revnets.memory.simulation import typical_gamma


@contextmanager
def simulated_once() -> Iterator[None]:
    """Reuse the footprint of an earlier simulation of an identical model."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("simulate", "costs_of_cells"):
            patch.setattr(planner, name, _remembered(getattr(planner, name)))
        yield


def _remembered(simulate: Callable[..., Any]) -> Callable[..., Any]:
    found: dict[Hashable, Any] = {}

    def remembered(model: nn.Module, *arguments: Any) -> Any:
        key = typical_gamma(model), _contents((model, arguments), {})
        if key not in found:
            found[key] = simulate(model, *arguments)
        return found[key]

    return remembered


def _contents(value: Any, seen: dict[int, tuple[int, Any]]) -> Hashable:
    """Return everything that a simulation depends on: shapes of tensors, settings, and identities of objects.

    Objects of unknown types are only equal to themselves.

    Args:
        seen: Visited objects by address. They are kept alive, so that addresses are not reused.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if id(value) in seen:
        return "again", seen[id(value)][0]
    seen[id(value)] = len(seen), value
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype, value.requires_grad, value.grad is None
    if isinstance(value, nn.Module):  # the keys of hooks are the numbers of their handles
        items = [(name, [*item.values()] if "_hooks" in name else item) for name, item in vars(value).items()]
        return type(value), tuple((name, _contents(item, seen)) for name, item in items)
    if isinstance(value, Mapping):
        return type(value), tuple((key, _contents(item, seen)) for key, item in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), tuple(_contents(item, seen) for item in value)
    if isinstance(value, (set, frozenset)):
        return type(value), frozenset(value)
    if isinstance(value, BaseModel):  # the hash of some objects raises an error
        return type(value), _contents(vars(value), seen)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_contents(getattr(value, field.name), seen) for field in dataclasses.fields(value))
    return value if value.__hash__ else (type(value), _contents(vars(value), seen))
