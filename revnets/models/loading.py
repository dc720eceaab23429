"""Loads a model from one word: a YAML file, the name of a model in an installed package, or an import path.

A package registers its models in the entry-point group `revnets.models`. Each entry point is a module or an object with
`names()`, which lists the models, and `create(name, **options)`, which builds one. `ENTRY:NAME`, such as
`timm:vit_base_patch16_224` or `hf:DIRECTORY`, selects one entry point, which need not list the name.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from revnets.config.errors import PartError, SpecError
from revnets.config.imports import importable, imported
from revnets.config.loader import Layer, Layers, Source
from revnets.config.net_spec import NetSpec
from revnets.config.overrides import apply_overrides
from revnets.models.net import build

GROUP = "revnets.models"


class ModelProvider(Protocol):
    """The interface of an entry point of the group `revnets.models`."""

    def names(self) -> Iterable[str]:
        """Return the names of all models."""
        ...

    def create(self, name: str, **options: Any) -> nn.Module:
        """Build a model by its name."""
        ...


def load_model(source: Source | NetSpec, overrides: Sequence[str] = (), *, trust: bool = True) -> nn.Module:
    """Build a model from a file, a dict, a spec or a name.

    Args:
        source: A YAML file, a dict or a `NetSpec`; the name of a model, such as timm's `revcol_tiny`; an import path
            `package.module:function`, which is called; or `timm:NAME`, `hf:NAME`.
        overrides: Items `key=value`: for a specification as in `revnets.build`, otherwise keyword arguments of the
            model.
        trust: Whether a YAML file, dict or spec may name classes of other projects. An import path in `source` is
            always called.

    Returns:
        The model.

    Raises:
        revnets.SpecError: If the file or model does not exist, is not trusted, or rejects its options.
    """
    if isinstance(source, (Mapping, NetSpec)):
        return build(source, overrides, trust=trust)
    name, file = str(source), Path(source)
    if file.suffix.lower() in (".yaml", ".yml") or os.path.exists(file):  # False for an invalid path
        return build(file, overrides, trust=trust)
    options = _options(overrides)
    prefix, separator, rest = name.partition(":")
    entry = next((entry for entry in entry_points(group=GROUP) if separator and entry.name == prefix), None)
    if entry is not None:
        return _called(name, partial(_loaded(entry, name).create, rest), options)
    if separator:
        with importable(Path.cwd()):
            try:
                return _called(name, imported("model", name, [Path.cwd()]), options)
            except PartError as error:
                raise SpecError(name, "", error.problem, error.remedy, error.code) from error
    providers, missing = _providers()
    for provider in providers:
        if name in provider.names():
            return _called(name, partial(provider.create, name), options)
    known = [item for provider in providers for item in provider.names()]
    near = get_close_matches(name, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else "Give a YAML file, a model's name or package.module:function"
    reason = f" (not available: {', '.join(missing)})" if missing else ""
    raise SpecError(name, "", f"no file and no model has this name{reason}", hint, code="unknown-model")


def _loaded(entry: EntryPoint, name: str) -> ModelProvider:
    try:
        return entry.load()
    except ImportError as error:
        raise SpecError(name, "", f"models of {entry.name} are not available: {error}", code="missing-module") from None


def _providers() -> tuple[list[ModelProvider], list[str]]:
    """Return the providers that can be imported, and an error message for each of the others."""
    providers, missing = [], []
    for entry in entry_points(group=GROUP):
        try:
            providers.append(entry.load())
        except ImportError as error:
            missing.append(f"{entry.name}: {error}")
    return providers, missing


def _options(overrides: Sequence[str]) -> dict[str, Any]:
    layers = Layers([Layer("command line", {})])
    apply_overrides(layers, overrides)
    return layers.data


def _called(name: str, factory: Any, options: dict[str, Any]) -> nn.Module:
    try:
        model = factory(**options)
    except SpecError:
        raise
    except Exception as error:  # a model's code may raise anything
        message = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise SpecError(name, "", message, "Check its options", code="component-failed") from error
    if not isinstance(model, nn.Module):
        message = f"returns a {type(model).__name__}"
        raise SpecError(name, "", message, "It must return a torch.nn.Module", code="invalid-component")
    return model
