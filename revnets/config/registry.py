"""Blocks, fusions, stems and heads by name; or any class by its import path `package.module:Class`.

The built-in parts (blocks.py, fusions.py, ends.py) register themselves when `revnets` is imported.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from revnets.config.errors import ArgumentError, nearest

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
    """A name that refers to no component. `remedy` says what to do, `code` is the kind of error."""

    def __init__(self, problem: str, remedy: str, code: str):
        super().__init__(f"{problem}. {remedy}")
        self.problem, self.remedy, self.code = problem, remedy, code


def _register(kind: str, name: str) -> Callable[[T], T]:
    if ":" in name:
        raise ArgumentError(f"{name!r}: the colon is kept for package.module:Class", "name")

    def decorate(factory: T) -> T:
        known = _REGISTRY[kind].get(name)
        # A module that is run again (notebooks, autoreload) may replace its own parts, but nobody else's.
        if known is not None and (known.__module__, known.__qualname__) != (factory.__module__, factory.__qualname__):
            raise ArgumentError(
                f"{kind} {name!r} is registered already, by {known.__module__}.{known.__qualname__}",
                "name",
                code="name-clash",
            )
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
    """All registered names of a kind: block, fusion, stem or head."""
    return sorted(_REGISTRY[kind])


def find_component(kind: str, name: str, folders: Sequence[Path] = ()) -> Factory:
    """The factory of a component.

    Args:
        kind: block, fusion, stem or head.
        name: under which it is registered, or `package.module:Class`.
        folders: searched for the module before `sys.path`.

    Raises:
        PartError: no such name, module or class.
    """
    if name in _REGISTRY[kind]:
        return _REGISTRY[kind][name]
    if ":" in name:
        return imported(kind, name, folders)
    problem = f'there is no {kind} "{name}"'
    if "." in name:
        raise PartError(
            problem,
            f"For a class of your own, write a colon before it: {':'.join(name.rsplit('.', 1))}",
            code="unknown-component",
        )
    raise PartError(
        problem, nearest(name, names(kind), "Give package.module:Class, or choose among"), code="unknown-component"
    )


def options(kind: str, name: str, folders: Sequence[Path] = ()) -> dict[str, inspect.Parameter]:
    """What may be set for a part, by name; a part that takes `**kwargs` has the entry `**`.

    Raises:
        PartError: no such part, or one that does not take what the framework passes.
    """
    factory = find_component(kind, name, folders)
    try:
        signature = inspect.signature(factory, eval_str=True)
    except Exception:  # annotations that cannot be evaluated here check nothing
        try:
            signature = inspect.signature(factory)
        except ValueError:
            raise PartError(
                f'{kind} "{name}" does not say what arguments it takes', "Wrap it in a class", code="invalid-component"
            ) from None
    parameters = list(signature.parameters.values())
    others = dict([("**", item) for item in parameters if item.kind is item.VAR_KEYWORD])
    named = {item.name: item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    for argument in PROVIDED[kind]:
        if argument not in named and not others:
            raise PartError(
                f'{kind} "{name}" does not take the argument `{argument}`, which every {kind} is given',
                f"Add {argument} to its arguments",
                code="invalid-component",
            )
    return {name: item for name, item in named.items() if name not in PROVIDED[kind]} | others


def imported(kind: str, name: str, folders: Sequence[Path] = ()) -> Factory:
    """The class or function `package.module:name`.

    Args:
        kind: what errors call it.
        folders: searched before `sys.path`.

    Raises:
        PartError: there is none, or its module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    try:
        with importable(*folders):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _failed(kind, name, error) from error  # the module is there, but not what it imports
        raise PartError(
            f'{kind} "{name}": there is no module {error.name}',
            "Check its spelling, and that it lies beside the file, in the working directory or on PYTHONPATH",
            code="missing-module",
        ) from error
    except (Exception, SystemExit) as error:  # whatever a user's module raises while it is imported
        raise _failed(kind, name, error) from error
    _check_place(kind, name, module, folders)
    factory = getattr(module, attribute, None)
    public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    if factory is None:
        raise PartError(
            f'{kind} "{name}": module {module_name} has no "{attribute}"',
            nearest(attribute, public, "It has") if public else "It has no classes at all",
            code="unknown-component",
        )
    if not callable(factory):
        raise PartError(
            f'{kind} "{name}": {attribute} is of type {type(factory).__name__}, not a class',
            nearest(attribute, public, "Classes and functions of the module are") if public else "Name a class",
            code="invalid-component",
        )
    return factory


@contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Let modules that lie in these folders be imported, also by each other."""
    added = [str(folder) for folder in dict.fromkeys(folders) if str(folder) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for folder in added:
            sys.path.remove(folder)


def _failed(kind: str, name: str, error: BaseException) -> PartError:
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f" in {Path(lines[-1].filename).name}, line {lines[-1].lineno}" if len(lines) > 1 else ""
    return PartError(
        f'{kind} "{name}": importing the module fails with {type(error).__name__}: {error}{where}',
        "Make `import` of it work first",
        code="import-failed",
    )


def _check_place(kind: str, name: str, module: ModuleType, folders: Sequence[Path]) -> None:
    """A module of that name beside the file must be the one that was imported, not another that came earlier."""
    top = module.__name__.partition(".")[0]
    loaded = getattr(sys.modules.get(top), "__file__", None)
    for folder in folders:
        for file in (folder / top / "__init__.py", folder / f"{top}.py"):
            if file.exists():
                if loaded is None or Path(loaded).resolve() != file.resolve():
                    raise PartError(
                        f'{kind} "{name}": another module {top} is loaded already ({loaded or "built in"})',
                        f"Rename {file}",
                        code="name-clash",
                    )
                return
