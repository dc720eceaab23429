"""Whole models by one word: a YAML file, a name that an installed package knows, or an import path.

A package makes its models known through the entry-point group `revnets.models`: each entry is a module (or any object)
with `names()`, which lists them, and `create(name, **options)`, which builds one. `ENTRY:name` asks one entry alone,
such as `timm:vit_base_patch16_224` or `hf:FOLDER`, whether or not it lists the name.
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
from revnets.models.net import build

GROUP = "revnets.models"


class Zoo(Protocol):
    """What an entry of the group gives."""

    def names(self) -> Iterable[str]: ...

    def create(self, name: str, **options: Any) -> nn.Module: ...


def load_model(source: Source | NetSpec, overrides: Sequence[str] = (), *, trust: bool = True) -> nn.Module:
    """Build the model that a word, a file, a dict or a spec stands for.

    Args:
        source: a YAML file, a dict or a `NetSpec`; the name of a model, such as timm's `revcol_tiny`; or
            `package.module:function`, which is called; or `timm:NAME`, `hf:NAME`.
        overrides: `key=value`; of a YAML as in `revnets.build`, else keyword arguments of the model.
        trust: may a YAML file, dict or spec name classes of other projects? An import path in `source` is called.

    Raises:
        revnets.SpecError: there is no such file or model, it is not trusted, or it refuses its options.
    """
    if isinstance(source, (Mapping, NetSpec)):
        return build(source, overrides, trust=trust)
    name, file = str(source), Path(source)
    if file.suffix.lower() in (".yaml", ".yml") or os.path.exists(file):  # False for what is no path at all
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
    zoos, missing = _zoos()
    for zoo in zoos:
        if name in zoo.names():
            return _called(name, partial(zoo.create, name), options)
    known = [item for zoo in zoos for item in zoo.names()]
    near = get_close_matches(name, known, n=1)
    remedy = f"Did you mean {near[0]}?" if near else "Give a YAML file, a model's name or package.module:function"
    reason = f" (names of {', '.join(missing)} are not available)" if missing else ""
    raise SpecError(name, "", f"there is neither such a file nor such a model{reason}", remedy, code="unknown-model")


def _loaded(entry: EntryPoint, name: str) -> Zoo:
    try:
        return entry.load()
    except ImportError as error:
        raise SpecError(name, "", f"names of {entry.name} are not available: {error}", code="missing-module") from None


def _zoos() -> tuple[list[Zoo], list[str]]:
    """Those that are installed, and what is missing for the others."""
    zoos, missing = [], []
    for entry in entry_points(group=GROUP):
        try:
            zoos.append(entry.load())
        except ImportError as error:
            missing.append(f"{entry.name}: {error}")
    return zoos, missing


def _options(overrides: Sequence[str]) -> dict[str, Any]:
    layers = Layers([Layer("command line", {})])
    for text in overrides:
        layers.override(text)
    return layers.data


def _called(name: str, factory: Any, options: dict[str, Any]) -> nn.Module:
    try:
        model = factory(**options)
    except SpecError:
        raise
    except Exception as error:  # whatever a model's code may raise
        said = next(iter(str(error).splitlines()), "")
        raise SpecError(
            name, "", f"{type(error).__name__}: {said}", "Check its options", code="component-failed"
        ) from error
    if not isinstance(model, nn.Module):
        raise SpecError(
            name, "", f"gives a {type(model).__name__}", "It must give a torch.nn.Module", code="invalid-component"
        )
    return model
