"""Registry of blocks, fusions, stems and heads by name, or of any nn.Module by import path `package.module:Class`.

The components of `revnets.nn` are registered when `revnets` is imported. Those of `vision` are imported when a
configuration names them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError, ValidationInfo
from torch import nn

from revnets.config.errors import ArgumentError, PartError, explain, nearest, problem, show, what
from revnets.config.imports import PACKAGES, imported
from revnets.config.loader import Strict, validate

Factory = Callable[..., Any]
T = TypeVar("T", bound=Factory)

PROVIDED = {
    "block": ("dim",),
    "fusion": ("dim", "reduction", "sources"),
    "stem": ("dim",),
    "head": ("dims",),
}
"""Arguments that the framework passes to a component of each kind. All others are options that YAML may set."""

IMPORTED: dict[str, dict[str, str]] = {
    "block": {
        "vit_post_norm": "vision.models.vit_blocks:PostNormBlock",
        "transformer": f"{PACKAGES[2]}.layers.transformer:TransformerBlock",
    },
    "stem": {"patch_embed": "vision.models.vit_blocks:PatchEmbed"},
}
"""Import paths of components of this project that are imported on first use, by kind and name."""

_REGISTRY: dict[str, dict[str, Factory]] = {kind: {} for kind in PROVIDED}


def _register(kind: str, name: str) -> Callable[[T], T]:
    if ":" in name:
        raise ArgumentError(f"{name!r}: a colon is reserved for package.module:Class", "name")

    def decorate(factory: T) -> T:
        known = _REGISTRY[kind].get(name)
        # A module that runs again (notebooks, autoreload) may replace its own components but no others.
        if known is not None and (known.__module__, known.__qualname__) != (factory.__module__, factory.__qualname__):
            raise ArgumentError(
                f"{kind} {name!r} is already registered by {known.__module__}.{known.__qualname__}",
                "name",
                code="name-clash",
            )
        _REGISTRY[kind][name] = factory
        return factory

    return decorate


def register_block(name: str) -> Callable[[T], T]:
    """Return a decorator that registers a block.

    A block is a class, or a function that returns a module. It is called with `dim=` (channels) and its options. Its
    forward pass keeps the shape of the state.

    Example:
        ```python
        @revnets.register_block("gated")
        class Gated(nn.Module):
            def __init__(self, dim: int, ratio: float = 2.0): ...
        ```

    Args:
        name: Name of the block in YAML, without a colon.

    Raises:
        ArgumentError: If the name contains a colon or belongs to another block.
    """
    return _register("block", name)


def register_fusion(name: str) -> Callable[[T], T]:
    """Return a decorator that registers a fusion: a class called with `dim=`, `reduction=`, `sources=` and its options.

    Args:
        name: Name of the fusion in YAML, without a colon.

    Raises:
        ArgumentError: If the name contains a colon or belongs to another fusion.
    """
    return _register("fusion", name)


def register_stem(name: str) -> Callable[[T], T]:
    """Return a decorator that registers a stem: a class called with `dim=` (channels of level 0) and its options.

    Args:
        name: Name of the stem in YAML, without a colon.

    Raises:
        ArgumentError: If the name contains a colon or belongs to another stem.
    """
    return _register("stem", name)


def register_head(name: str) -> Callable[[T], T]:
    """Return a decorator that registers a head: a class called with `dims=` (channels of all levels) and its options.

    Args:
        name: Name of the head in YAML, without a colon.

    Raises:
        ArgumentError: If the name contains a colon or belongs to another head.
    """
    return _register("head", name)


def names(kind: str) -> list[str]:
    """Return the names of all components of a kind: block, fusion, stem or head."""
    return sorted({*_REGISTRY[kind], *IMPORTED.get(kind, ())})


def find_component(kind: str, name: str, folders: Sequence[Path] = (), trust: bool = True) -> Factory:
    """Return the class or function that builds a component, without calling it.

    Args:
        kind: Block, fusion, stem or head.
        name: Registered name, or `package.module:Class` of a subclass of `nn.Module`.
        folders: Directories searched for the module before `sys.path`.
        trust: Whether modules of other projects may be imported, which runs their code.

    Raises:
        PartError: If the name, module or class does not exist or is not trusted.
    """
    registered = _REGISTRY[kind]
    if name in registered:
        return registered[name]
    name = IMPORTED.get(kind, {}).get(name, name)
    if ":" in name:
        factory = imported(kind, name, folders, trust)
        is_module = isinstance(factory, type) and issubclass(factory, nn.Module)
        if not is_module and not any(factory is item for item in registered.values()):
            raise PartError(
                f'{kind} "{name}" is not a subclass of torch.nn.Module',
                f"Derive it from torch.nn.Module, or decorate a function with revnets.register_{kind}",
                code="invalid-component",
            )
        return factory
    problem = f'there is no {kind} "{name}"'
    if "." in name:
        raise PartError(
            problem,
            f"For a custom class, write a colon before its name: {':'.join(name.rsplit('.', 1))}",
            code="unknown-component",
        )
    raise PartError(
        problem, nearest(name, names(kind), "Give package.module:Class, or choose among"), code="unknown-component"
    )


def options(kind: str, name: str, folders: Sequence[Path] = (), trust: bool = True) -> dict[str, inspect.Parameter]:
    """Return the options of a component by name. A component that accepts `**kwargs` has the entry `**`.

    Args:
        kind: Block, fusion, stem or head.
        name: Registered name, or `package.module:Class`.
        folders: Directories searched for the module before `sys.path`.
        trust: Whether modules of other projects may be imported.

    Raises:
        PartError: If the component does not exist, is not trusted, or lacks an argument that the framework passes.
    """
    factory = find_component(kind, name, folders, trust)
    try:
        signature = inspect.signature(factory, eval_str=True)
    except Exception:  # annotations that cannot be evaluated are not checked
        try:
            signature = inspect.signature(factory)
        except ValueError:
            raise PartError(
                f'{kind} "{name}" has no signature that can be inspected',
                "Wrap it in a class",
                code="invalid-component",
            ) from None
    parameters = list(signature.parameters.values())
    others = dict([("**", item) for item in parameters if item.kind is item.VAR_KEYWORD])
    named = {item.name: item for item in parameters if item.kind in (item.POSITIONAL_OR_KEYWORD, item.KEYWORD_ONLY)}
    for argument in PROVIDED[kind]:
        if argument not in named and not others:
            raise PartError(
                f'{kind} "{name}" does not accept the argument `{argument}`, which every {kind} needs',
                f"Add {argument} to its arguments",
                code="invalid-component",
            )
    return {name: item for name, item in named.items() if name not in PROVIDED[kind]} | others


class PartSpec(Strict):
    """A stem, fusion or head. In YAML, a name alone such as `linear` is short for `{type: linear}`.

    Attributes:
        type: Registered name, or `package.module:Class`.
        options: Options of the component.
    """

    type: str
    options: dict[str, Any] = Field(default_factory=dict)


def part(kind: str) -> BeforeValidator:
    """Return a validator that splits `{type: name, option: value, ...}` into name and checked options."""

    def split(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, PartSpec):
            return value
        if isinstance(value, str):
            name, checked = name_and_options(kind, {"type": value}, "type", ("type",), info, short=True)
        elif isinstance(value, dict):
            name, checked = name_and_options(kind, value, "type", ("type",), info)
        else:
            raise problem(
                what(value), f"Give a name, or {{type: name, ...}} with the options of the {kind}", code="wrong-type"
            )
        return {"type": name, "options": checked}

    return BeforeValidator(split)


def name_and_options(
    kind: str, given: dict[str, Any], key: str, reserved: Sequence[str], info: ValidationInfo, short: bool = False
) -> tuple[str, dict[str, Any]]:
    """Return the name of a component and its options, checked against its signature.

    Args:
        kind: Block, fusion, stem or head.
        given: Mapping with the name and the options.
        key: Key of the name.
        reserved: Keys that are not options.
        info: Validation info of pydantic. Its context may contain `folders` and `trust`, see `find_component`.
        short: Whether the configuration contains only the name. Errors then have no key below that place.

    Raises:
        PydanticCustomError: If the component cannot be used, or an option is unknown, missing or invalid.
    """
    if key not in given:
        for other in get_close_matches(key, given, n=1):
            raise problem(
                f"unknown key (value {show(given[other])})", f"Did you mean {key}?", other, code="unknown-key"
            )
        raise problem("this key is missing", f"Add it, as in `{key}: {names(kind)[0]}`", key, code="missing-key")
    name = given[key]
    if not isinstance(name, str):
        raise problem(what(name), f"Give the name of a {kind}, or package.module:Class", key, code="wrong-type")
    try:
        context = info.context or {}
        allowed = options(kind, name, context.get("folders", ()), context.get("trust", True))
    except PartError as error:
        raise problem(error.problem, error.remedy, *(() if short else (key,)), code=error.code) from None
    checked = {}
    for option, value in given.items():
        if option in reserved:
            continue
        if option in PROVIDED[kind]:
            raise problem(
                f'{kind} "{name}" gets {option} from the levels', "Remove the key", option, code="reserved-key"
            )
        if option in allowed:
            checked[option] = _typed(option, value, allowed[option])
        elif "**" in allowed:
            checked[option] = value
        else:
            known = [*reserved, *allowed]
            text = f'unknown key: {kind} "{name}" has no such option (value {show(value)})'
            raise problem(text, nearest(option, known, "Known keys are"), option, code="unknown-key")
    for option, parameter in allowed.items():
        if option != "**" and parameter.default is inspect.Parameter.empty and option not in checked:
            if option in reserved:
                text = f'the argument {option} of {kind} "{name}" has the name of a reserved key'
                raise problem(text, "Rename the argument in the code", key, code="name-clash")
            raise problem(
                f'{kind} "{name}" needs this option', f"Add it, as in `{option}: ...`", option, code="missing-key"
            )
    return name, checked


def _typed(option: str, value: Any, parameter: inspect.Parameter) -> Any:
    """Convert a value to the type of the annotation by strict rules: a list becomes a tuple, but text not a number."""
    if parameter.annotation is inspect.Parameter.empty or isinstance(parameter.annotation, str):
        return value
    config = ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False)
    try:
        return validate(TypeAdapter(parameter.annotation, config=config), value)
    except ValidationError as error:
        complaint = explain(error, value)
    except (PydanticUserError, TypeError, NameError):  # a type that pydantic cannot check
        return value
    raise problem(complaint.problem, complaint.remedy, option, *complaint.keys, code=complaint.code)
