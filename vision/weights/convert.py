"""The command `revnets convert`: converts between official RevCol checkpoints and our layout, checking every name."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from revnets import NetSpec
from revnets.config.errors import option_error
from revnets.utils.atomic_files import replacing
from vision.checkpoints.new_file import new_file
from vision.config.learning import SupervisionConfig
from vision.errors import CheckpointError, first_line
from vision.models.architecture import RevCol
from vision.supervision.supervised import Supervised
from vision.weights.files import Weights, channels_in, class_count, read, select
from vision.weights.official_names import (
    AROUND_BACKBONE,
    BACKBONE,
    HEADS,
    MismatchError,
    Names,
    check,
    names_of,
    official_name,
    to_official,
    to_ours,
)
from vision.weights.recognition import family, recognize, shape_in, spec_of

LAYOUTS = ("classification", "detection", "segmentation")
"""Official layouts that can be written. The last two are equal: tensors below `backbone.`, in `state_dict`."""

SUFFIXES = {".safetensors": "ours", ".pth": "official"}
"""Layout of the file to write, by its suffix."""


@dataclass(frozen=True)
class Converted:
    """The tensors of a model under new names, and counts of the omitted tensors.

    Attributes:
        model: Name of the model.
        tensors: In the order of the model.
        options: Of `timm.create_model`.
        left_out: Number of omitted tensors of the source, by the component that they belong to.
        zero_gains: Number of gains of exactly 0, which the official code keeps and which are used as +0.001 here.
    """

    model: str
    tensors: dict[str, Tensor]
    options: dict[str, int]
    left_out: dict[str, int]
    zero_gains: int


def convert(
    source: Weights,
    layout: str = "ours",
    model: str | None = None,
    heads: bool = False,
    allow: Sequence[str] = (),
    path: Path | str = "weights",
) -> Converted:
    """Rename and reshape the tensors of a file.

    Args:
        source: Of `vision.weights.files.select`.
        layout: `ours`, or one of `LAYOUTS`.
        model: Name of the model; recognized by the shapes if None.
        heads: Whether to keep the classifiers and decoders of intermediate supervision.
        allow: Names as in the source, or patterns, that may be missing, unexpected or misshapen. They are omitted.
        path: For messages.

    Raises:
        MismatchError: If a name is missing or unexpected, or a shape differs, and is not allowed to.
        CheckpointError: If no model has this shape.
        revnets.SpecError: If there is no model of that name.
    """
    given = source.tensors
    if source.layout == "ours" and not heads:  # our layout may have any number of heads
        source = source._replace(tensors={key: given[key] for key in given if not key.startswith(HEADS)})
    shape = shape_in(_official(source))
    name = model or recognize(shape, path)
    if name not in family():
        problem = f"unknown model {name!r}"
        raise option_error("--model", problem, f"Choose one of {', '.join(family())}", code="unknown-choice")
    kernel_size = shape.kernel_size if shape else 3
    net, options = skeleton(source, spec_of(name, kernel_size))
    names = names_in(source, net)
    whole = ours_of(source, names, allow, path, name)
    kept = {key: tensor for key, tensor in whole.items() if heads or not key.startswith(HEADS)}
    if layout in LAYOUTS[1:]:
        kept = {key: tensor for key, tensor in kept.items() if not key.startswith(("head.", *HEADS))}
    zeros = sum(int((tensor == 0).sum()) for key, tensor in kept.items() if key.endswith("gain.weight"))
    left_out = Counter(_owners(source, names, kept))
    left_out["intermediate supervision"] += len(given) - len(source.tensors)
    if layout != "ours":
        plain = net.model if isinstance(net, Supervised) and not heads else net
        kept = to_official(kept, names_of(plain, "classification" if layout == "classification" else "backbone"))
    if kernel_size != 3:
        options["kernel_size"] = kernel_size
    return Converted(name, kept, options, dict(+left_out), zeros)


def skeleton(source: Weights, spec: NetSpec) -> tuple[RevCol | Supervised, dict[str, int]]:
    """Build the model of a file on the meta device, with its number of classes, and its intermediate heads if any.

    Returns:
        The model, and its `num_classes` and `in_chans`.
    """
    options = {"num_classes": class_count(source.tensors), "in_chans": channels_in(source.tensors)}
    net = RevCol(spec, options["num_classes"], options["in_chans"], device="meta")
    names = source.tensors
    if options["num_classes"] and any(key.startswith((*HEADS, "cls_blocks.", "decoder_blocks.")) for key in names):
        is_staged = any(".stages." in key or ".proj_layers." in key for key in names)
        with torch.device("meta"):
            return Supervised(net, SupervisionConfig(decoder="staged" if is_staged else "single")), options
    return net, options


def names_in(source: Weights, net: RevCol | Supervised) -> Names:
    """The names that a file of this model must have."""
    has_classifier = any(key.startswith(("cls", "head.")) for key in source.tensors)
    return names_of(net, "classification" if has_classifier else "backbone")


def _official(source: Weights) -> dict[str, Tensor]:
    """The tensors of the columns under their official names, in their shapes in the file."""
    if source.layout != "ours":
        return source.tensors
    found = {key: official_name(key, BACKBONE) for key in source.tensors}
    return {name[0]: source.tensors[key] for key, name in found.items() if name is not None}


def ours_of(source: Weights, names: Names, allow: Sequence[str], path: Path | str, model: str) -> dict[str, Tensor]:
    """The tensors of a file that belong to the model, under our names.

    Raises:
        MismatchError: If a name is missing or unexpected, or a shape differs, and is not allowed to.
    """
    known = (*AROUND_BACKBONE, *allow)
    strange = [key for key in source.around if not any(fnmatchcase(key, pattern) for pattern in known)]
    if strange:
        raise MismatchError(path, model, [f"unexpected {key}" for key in strange])
    if source.layout != "ours":
        return to_ours(source.tensors, names, allow, path, model)
    fitting = check({pair.ours: pair.our_shape for pair in names.pairs}, source.tensors, allow, (), path, model)
    return {key: source.tensors[key] for key in fitting}


def _owners(source: Weights, names: Names, kept: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield the component of every tensor of the source that is omitted."""
    ours = {pair.ours if source.layout == "ours" else pair.official: pair.ours for pair in names.pairs}
    for key in source.around:
        yield key.partition(".")[0]
    for key in source.tensors:
        if key in names.unused:
            yield "gains of the first column, which have no effect"
        elif (mine := ours.get(key)) is None:
            yield "unknown, but allowed"
        elif mine not in kept:
            is_head = mine.startswith(HEADS)
            is_classifier = mine.startswith("head.")
            yield "intermediate supervision" if is_head else "classifier" if is_classifier else "misshapen, but allowed"


def convert_file(
    source: Path,
    target: Path,
    layout: str = "classification",
    model: str | None = None,
    weights: str = "raw",
    heads: bool = False,
    allow: Sequence[str] = (),
) -> Converted:
    """Convert a file and report the result.

    Args:
        source: An official checkpoint, a checkpoint of `revnets train`, or a .safetensors file.
        target: A new file: .safetensors for our layout, .pth for the official one.
        layout: Of a .pth file.
        model, heads, allow: as in `convert`.
        weights: `raw` or `ema`.

    Raises:
        CheckpointError: If the source cannot be used, or the target exists or cannot be written.
        revnets.SpecError: If an argument is wrong.
    """
    console, errors = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)
    kind = SUFFIXES.get(target.suffix)
    if kind is None:
        text = "Use .safetensors (our layout) or .pth (the official one)"
        raise option_error("TARGET", f"{target} has no known suffix", text, code="unknown-suffix")
    if os.path.lexists(target):
        raise CheckpointError(target, "it already exists", "Give a new path", code="file-exists")
    with errors.status(f"reading {source}"):
        found = select(read(source), weights, source)
    if kind == "official" and found.layout != "ours":
        raise CheckpointError(
            source, "it is already in the official layout", "Use a TARGET with .safetensors", code="wrong-format"
        )
    try:
        done = convert(found, layout if kind == "official" else "ours", model, heads, allow, source)
    except MismatchError as error:
        for problem in error.problems:
            errors.print(problem, markup=False)
        raise
    size = sum(tensor.nbytes for tensor in done.tensors.values())
    with errors.status(f"writing {target}, {size / 2**20:,.1f} MiB"):
        write(target, done, layout, weights)
    console.print(f"{done.model}: {len(found.tensors) + len(found.around)} tensors read", markup=False)
    for owner, count in done.left_out.items():
        console.print(f"omitted: {count} ({owner})", markup=False)
    if done.zero_gains:
        console.print(f"{done.zero_gains} gains are exactly 0, which cannot be inverted; they are used as 0.001")
    console.print(f"wrote {target}: {len(done.tensors)} tensors, {size / 2**20:,.1f} MiB", markup=False)
    return done


def write(target: Path, done: Converted, layout: str = "classification", weights: str = "raw") -> None:
    """Write a new file atomically.

    Raises:
        CheckpointError: If the file exists, another process is writing it, or it cannot be written.
    """
    tensors = {key: _alone(tensor) for key, tensor in done.tensors.items()}
    with new_file(target), replacing(target) as file:
        if SUFFIXES[target.suffix] == "official":
            torch.save(_wrapped(tensors, layout), file)
            return
        facts = {"format": "pt", "model": done.model, "weights": weights}
        try:
            save_file(tensors, file.name, facts | {key: str(value) for key, value in done.options.items()})
        except SafetensorError as error:
            raise OSError(first_line(error)) from error


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that does not share its storage, so that nothing else is written."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _wrapped(tensors: dict[str, Tensor], layout: str) -> dict[str, Any]:
    """Wrap tensors in the structure of an official file."""
    if layout == "classification":
        return {"model": tensors}
    return {"meta": {}, "state_dict": {f"backbone.{key}": tensor for key, tensor in tensors.items()}}
