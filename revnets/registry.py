"""Blocks, fusions, stems and heads by name; or any class by its import path `package.module:Class`.

The built-in parts (blocks.py, fusions.py, ends.py) register themselves when `revnets` is imported.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

Factory = Callable[..., Any]
T = TypeVar("T", bound=Factory)

PROVIDED = {
    "block": ("dim",),
    "fusion": ("dim", "reduction", "sources"),
    "stem": ("dim",),
    "head": ("dims",),
}
"""Arguments that the framework passes to a part of each kind; all others are options that a YAML may set."""

_REGISTRY: dict[str, dict[str, Factory]] = {kind: {} for kind in PROVIDED}


class PartError(ValueError):
    """A name that stands for no part. `remedy` says what to do."""

    def __init__(self, problem: str, remedy: str):
        super().__init__(f"{problem}. {remedy}")
        self.problem, self.remedy = problem, remedy


def _register(kind: str, name: str) -> Callable[[T], T]:
    def decorate(factory: T) -> T:
        if name in _REGISTRY[kind] and _REGISTRY[kind][name] is not factory:
            raise ValueError(f"{kind} {name!r} is registered already, by {_REGISTRY[kind][name]!r}")
        _REGISTRY[kind][name] = factory
        return factory

    return decorate


def register_block(name: str) -> Callable[[T], T]:
    """Make a block known as `name`: a class called with `dim=` and its options; states keep their shape."""
    return _register("block", name)


def register_fusion(name: str) -> Callable[[T], T]:
    """Make a fusion known as `name`: a class called with `dim=, reduction=, sources=` and its options."""
    return _register("fusion", name)


def register_stem(name: str) -> Callable[[T], T]:
    """Make a stem known as `name`: a class called with `dim=` (of level 0) and its options."""
    return _register("stem", name)


def register_head(name: str) -> Callable[[T], T]:
    """Make a head known as `name`: a class called with `dims=` (of all levels) and its options."""
    return _register("head", name)


def names(kind: str) -> list[str]:
    return sorted(_REGISTRY[kind])


def find(kind: str, name: str) -> Factory:
    """The factory that `name` stands for.

    Raises:
        PartError: no such name, module or class.
    """
    if name in _REGISTRY[kind]:
        return _REGISTRY[kind][name]
    if ":" in name:
        return _import(kind, name)
    near = get_close_matches(name, _REGISTRY[kind], n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Choose {', '.join(names(kind))}, or give package.module:Class"
    raise PartError(f"there is no {kind} {name!r}", hint)


def options(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """What may be set for a part, by name; a part that takes `**kwargs` has the entry `**`."""
    factory = find(kind, name)
    try:
        signature = inspect.signature(factory, eval_str=True)
    except (NameError, TypeError):  # annotations that cannot be evaluated here check nothing
        signature = inspect.signature(factory)
    found = {}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found["**"] = parameter
        elif parameter.kind is not parameter.VAR_POSITIONAL and parameter.name not in PROVIDED[kind]:
            found[parameter.name] = parameter
    return found


@contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Let `package.module:Class` find modules that lie in these folders."""
    added = [str(folder) for folder in folders if str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _import(kind: str, name: str) -> Factory:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module raises while it is imported
        raise PartError(
            f"{kind} {name!r}: module {module_name!r} cannot be imported ({type(error).__name__}: {error})",
            "Check the spelling, and that the module lies beside the file, in the working directory or on PYTHONPATH",
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        near = get_close_matches(attribute, [key for key in vars(module) if not key.startswith("_")], n=1)
        raise PartError(
            f"{kind} {name!r}: module {module_name!r} has no class {attribute!r}",
            f"Did you mean {near[0]!r}?" if near else "Check the spelling",
        )
    return factory

