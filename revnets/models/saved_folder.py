"""Folders of `save_pretrained`: what is in one is compared with what should be there, before memory is taken for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from revnets.config.errors import ArgumentError, SpecError, first_line
from revnets.utils.regular_files import require_regular

MAX_CONFIG = 2**24
"""Bytes of a configuration."""

FREE_ELEMENTS = 2**20
"""How many numbers a model may have beyond those in its files, for buffers and heads that are new."""


def require_config(folder: Path) -> None:
    """The configuration of a folder is a file, and no larger than one can be.

    Raises:
        revnets.SpecError: it is not.
    """
    path = folder / "config.json"
    try:
        require_regular(path)
        if path.exists() and path.stat().st_size > MAX_CONFIG:
            problem = f"larger than {MAX_CONFIG:,} bytes"
            raise SpecError(str(path), "", problem, "Use the file of the model", code="too-large")
    except OSError as error:
        raise SpecError(str(path), "", error.strerror or "cannot be read", code="not-a-file") from None


@contextmanager
def configuration_errors(source: Path) -> Iterator[None]:
    """Turn what a damaged configuration causes into one line.

    transformers checks few values, so any exception may follow from a wrong one.

    Args:
        source: file or folder of the configuration.

    Raises:
        revnets.SpecError: with the key and the code of an `ArgumentError`, and without a key for all others.
    """
    try:
        yield
    except SpecError:
        raise
    except ArgumentError as error:
        raise SpecError(str(source), error.key, str(error), code=error.code) from None
    except Exception as error:
        problem = f"this configuration cannot be used ({type(error).__name__}: {error})"
        raise SpecError(str(source), "", problem, "Use the configuration of these weights") from None


def require_room(
    folder: Path, build: Callable[[], nn.Module], blocks: Mapping[str, int], size: str, free: int = FREE_ELEMENTS
) -> None:
    """A model is no larger than the weights that its folder has for it; what is missing would be made up.

    Args:
        build: makes the model, on the meta device.
        blocks: numbers of modules that the configuration asks for, by key; each has a tensor at least.
        size: key of its channels, for messages; empty if several keys have them.
        free: how many numbers it may have beyond those in its files.

    Raises:
        revnets.SpecError: the configuration asks for more or cannot be used, or weights are missing or damaged.
    """
    sizes = _sizes(folder)
    if not sizes:
        problem = "there are no weights in files of safetensors"
        raise SpecError(str(folder), "", problem, "Save the model with save_pretrained", code="missing-weights")
    remedy = "Use the configuration of these weights"
    for key, count in blocks.items():
        if count > len(sizes):
            problem = f"{count:,} blocks, but there are {len(sizes):,} tensors"
            raise SpecError(str(folder), key, problem, remedy, code="weights-mismatch")
    with configuration_errors(folder):
        try:
            with torch.device("meta"):
                needed = sum(parameter.numel() for parameter in build().parameters())
        except RuntimeError as error:  # sizes whose product overflows
            raise SpecError(str(folder), size, first_line(error), remedy, code="weights-mismatch") from None
    if needed > sum(sizes.values()) + free:
        problem = f"a model of {needed:,} parameters, but its weights are {sum(sizes.values()):,} numbers"
        raise SpecError(str(folder), size, problem, remedy, code="weights-mismatch")


def require_all(folder: str, info: dict[str, Any]) -> None:
    """All weights of a model came from its files, and none of a file is left over.

    Args:
        info: what transformers reports of the loading.

    Raises:
        revnets.SpecError: names a weight that is missing, has another shape or belongs to no layer.
    """
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    kinds = {"missing": missing, "of another shape": mismatched, "left over": sorted(info["unexpected_keys"])}
    for kind, names in kinds.items():
        if names:
            name = names[0] if isinstance(names[0], str) else names[0][0]
            problem = f"{name} is {kind}" + (f", with {len(names) - 1} more" if len(names) > 1 else "")
            raise SpecError(folder, "weights", problem, "Use the configuration of these weights", "weights-mismatch")


def _sizes(folder: Path) -> dict[str, int]:
    """Numbers in each tensor of the files of a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            require_regular(path)
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # it is no mapping
                    found[name] = torch.Size(file.get_slice(name).get_shape()).numel()
        except (OSError, SafetensorError) as error:
            raise SpecError(str(path), "", first_line(error), "Use another copy", code="damaged-file") from None
    return found
