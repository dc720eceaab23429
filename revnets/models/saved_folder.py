"""Checks of directories written by `save_pretrained`, before memory is allocated for their model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from revnets.config.errors import ArgumentError, SpecError, first_line
from revnets.utils.regular_files import require_regular

MAX_CONFIG = 2**24
"""Maximum size of a configuration file in bytes."""

FREE_ELEMENTS = 2**20
"""Number of elements that a model may have in addition to those in its files, for buffers and new heads."""


def require_config(folder: Path) -> None:
    """Check that a directory has the configuration of a whole model, in a regular file of acceptable size.

    Raises:
        revnets.SpecError: If the configuration is not a regular file or too large, its weights are quantized, or the
            directory has an adapter of peft.
    """
    path, adapter = folder / "config.json", folder / "adapter_config.json"
    if adapter.exists():  # transformers would load the base model that it names, from anywhere
        problem = "an adapter of peft is not a whole model"
        hint = "Load its base model and then peft.PeftModel.from_pretrained, or save the merged model"
        raise SpecError(str(adapter), "", problem, hint, code="wrong-format")
    try:
        require_regular(path)
        if path.exists() and path.stat().st_size > MAX_CONFIG:
            problem = f"larger than {MAX_CONFIG:,} bytes"
            raise SpecError(str(path), "", problem, "Use the file of the model", code="too-large")
    except OSError as error:
        raise SpecError(str(path), "", error.strerror or "cannot be read", code="not-a-file") from None
    values = None
    if path.exists():
        with suppress(OSError, ValueError, RecursionError):  # reported where the values are used
            values = json.loads(path.read_bytes())
    require_unquantized(path, values)


def require_unquantized(path: Path, values: Any) -> None:
    """Check that a configuration describes weights that are not quantized.

    Raises:
        revnets.SpecError: If it has the key `quantization_config`.
    """
    if isinstance(values, Mapping) and values.get("quantization_config") is not None:
        problem = "quantized weights are not supported"
        raise SpecError(str(path), "quantization_config", problem, "Use the unquantized model", code="reserved-key")


@contextmanager
def configuration_errors(source: Path) -> Iterator[None]:
    """Convert any exception that an invalid configuration causes into a `SpecError`.

    transformers validates few values, so an invalid one may raise any exception.

    Args:
        source: File or directory of the configuration.

    Raises:
        revnets.SpecError: With the key and code of an `ArgumentError`; other exceptions have no key.
    """
    try:
        yield
    except SpecError:
        raise
    except ArgumentError as error:
        raise SpecError(str(source), error.key, str(error), code=error.code) from None
    except Exception as error:
        problem = f"invalid configuration ({type(error).__name__}: {error})"
        raise SpecError(str(source), "", problem, "Use the configuration of these weights") from None


def require_room(
    folder: Path, build: Callable[[], nn.Module], blocks: Mapping[str, int], size: str, free: int = FREE_ELEMENTS
) -> None:
    """Check that a model is no larger than the weights in its directory.

    Args:
        folder: Directory of the configuration and the weights.
        build: Builds the model; called on the meta device.
        blocks: Number of modules in the configuration, by key; each module has at least one tensor.
        size: Key of the channels, for error messages; empty if several keys determine them.
        free: Number of elements that the model may have in addition to those in its files.

    Raises:
        revnets.SpecError: If the configuration is invalid or describes a larger model, or weights are missing or
            damaged.
    """
    sizes = _sizes(folder)
    if not sizes:
        problem = "there are no weights in safetensors files"
        raise SpecError(str(folder), "", problem, "Save the model with save_pretrained", code="missing-weights")
    hint = "Use the configuration of these weights"
    for key, count in blocks.items():
        if count > len(sizes):
            problem = f"{count:,} blocks, but only {len(sizes):,} tensors"
            raise SpecError(str(folder), key, problem, hint, code="weights-mismatch")
    with configuration_errors(folder):
        try:
            with torch.device("meta"):
                needed = sum(parameter.numel() for parameter in build().parameters())
        except RuntimeError as error:  # sizes whose product overflows
            raise SpecError(str(folder), size, first_line(error), hint, code="weights-mismatch") from None
    if needed > sum(sizes.values()) + free:
        problem = f"a model of {needed:,} parameters, but its weights have {sum(sizes.values()):,} elements"
        raise SpecError(str(folder), size, problem, hint, code="weights-mismatch")


def require_all(folder: str, info: dict[str, Any]) -> None:
    """Check that a model loaded all weights of its files and needs no others.

    Args:
        folder: Directory of the files.
        info: Loading information from transformers.

    Raises:
        revnets.SpecError: If a weight is missing, has another shape or belongs to no layer; the message names it.
    """
    missing, mismatched = sorted(info["missing_keys"]), sorted(info["mismatched_keys"])
    kinds = {"missing": missing, "of another shape": mismatched, "unexpected": sorted(info["unexpected_keys"])}
    for kind, names in kinds.items():
        if names:
            name = names[0] if isinstance(names[0], str) else names[0][0]
            problem = f"{name} is {kind}" + (f", and {len(names) - 1} more" if len(names) > 1 else "")
            raise SpecError(folder, "weights", problem, "Use the configuration of these weights", "weights-mismatch")


def _sizes(folder: Path) -> dict[str, int]:
    """Return the number of elements of each tensor in the files of a directory, by name."""
    sizes = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            require_regular(path)
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # not a mapping
                    sizes[name] = torch.Size(file.get_slice(name).get_shape()).numel()
        except (OSError, SafetensorError) as error:
            raise SpecError(str(path), "", first_line(error), "Use another copy", code="damaged-file") from None
    return sizes
