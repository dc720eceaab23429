"""Table of the names in official RevCol checkpoints, and checks of every name in a file.

The columns have the same names in all released files. Files for classification have one classifier, or the four
classifiers and three decoders of intermediate supervision. Files of detectors and segmenters have the backbone below
`backbone.`, next to the other components.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from vision.errors import CheckpointError
from vision.models.architecture import RevCol
from vision.supervision.supervised import Supervised

TensorShape = tuple[int, ...]


class Row(NamedTuple):
    """One of our names, the corresponding official name, and the conversion of our shape to the official one.

    `{word}` matches a number, `*` matches `weight` or `bias`.
    """

    ours: str
    official: str
    view: str = "same"


_CELL, _LEVEL = "columns.cells.{column}.{level}.function.", "subnet{column}.level{level}."
_STAGE = "decoders.{column}.stages.{stage}."
_NORMAL = "decoder_blocks.{head}.normal_layers.{stage}.0."

BACKBONE = (
    Row("stem.conv.*", "stem.0.*"),
    Row("stem.norm.*", "stem.1.*"),
    Row("columns.cells.{column}.{level}.gain.weight", "subnet{column}.alpha{level}", "gain"),
    Row(_CELL + "fusion.paths.0.conv.*", _LEVEL + "fusion.down.0.*"),
    Row(_CELL + "fusion.paths.0.norm.*", _LEVEL + "fusion.down.1.*"),
    Row(_CELL + "fusion.paths.1.proj.linear.*", _LEVEL + "fusion.up.channel_reschedule.0.*"),
    Row(_CELL + "fusion.paths.1.proj.norm.*", _LEVEL + "fusion.up.channel_reschedule.1.*"),
    Row(_CELL + "fusion.paths.2.proj.linear.*", _LEVEL + "fusion.up2.channel_reschedule.0.*"),  # RevCol-H
    Row(_CELL + "fusion.paths.2.proj.norm.*", _LEVEL + "fusion.up2.channel_reschedule.1.*"),
    Row(_CELL + "blocks.{block}.dwconv.*", _LEVEL + "blocks.{block}.dwconv.*"),
    Row(_CELL + "blocks.{block}.norm.*", _LEVEL + "blocks.{block}.norm.*"),
    Row(_CELL + "blocks.{block}.mlp.fc1.*", _LEVEL + "blocks.{block}.pwconv1.*"),
    Row(_CELL + "blocks.{block}.mlp.fc2.*", _LEVEL + "blocks.{block}.pwconv2.*"),
    Row(_CELL + "blocks.{block}.scale.gamma", _LEVEL + "blocks.{block}.gamma"),
)

CLASSIFIER = (
    Row("head.norm.*", "cls.classifier.0.*"),
    Row("head.fc.*", "cls.classifier.1.*"),
)

SUPERVISION = (
    Row("head.norm.*", "cls_blocks.3.classifier.0.*"),
    Row("head.fc.*", "cls_blocks.3.classifier.1.*"),
    Row("classifiers.{column}.norm.*", "cls_blocks.{head}.classifier.0.*"),
    Row("classifiers.{column}.fc.*", "cls_blocks.{head}.classifier.1.*"),
)

DECODERS = {
    "staged": (  # up to 1000 classes
        Row(_STAGE + "proj.weight", "decoder_blocks.{head}.proj_layers.{stage}.0.weight", "conv"),
        Row(_STAGE + "proj.bias", "decoder_blocks.{head}.proj_layers.{stage}.0.bias"),
        Row(_STAGE + "norm.*", "decoder_blocks.{head}.proj_layers.{stage}.1.*"),
        Row(_STAGE + "block.dwconv.*", _NORMAL + "dwconv.*"),
        Row(_STAGE + "block.norm.*", _NORMAL + "norm.*"),
        Row(_STAGE + "block.mlp.fc1.*", _NORMAL + "pwconv1.*"),
        Row(_STAGE + "block.mlp.fc2.*", _NORMAL + "pwconv2.*"),
        Row(_STAGE + "block.scale.gamma", _NORMAL + "gamma"),
        Row("decoders.{column}.to_pixels.proj.weight", "decoder_blocks.{head}.projback.0.weight", "conv"),
        Row("decoders.{column}.to_pixels.proj.bias", "decoder_blocks.{head}.projback.0.bias"),
    ),
    "single": (  # more than 1000 classes
        Row("decoders.{column}.norm.*", "decoder_blocks.{head}.projback.0.*"),
        Row("decoders.{column}.to_pixels.proj.weight", "decoder_blocks.{head}.projback.1.weight", "conv"),
        Row("decoders.{column}.to_pixels.proj.bias", "decoder_blocks.{head}.projback.1.bias"),
    ),
}

HEADS = ("classifiers.", "decoders.")
"""Prefixes of our names of the heads of intermediate supervision."""

MIN_GAIN = 1e-3
"""Smallest magnitude of a gain (section 2.2.2), as in the official code."""

AROUND_BACKBONE = ("neck.*", "rpn_head.*", "roi_head.*", "decode_head.*", "auxiliary_head.*")
"""Components of a detector or a segmenter outside of the backbone."""


class MismatchError(CheckpointError):
    """Names or shapes do not fit. `problems` has a line for each."""

    def __init__(self, path: object, model: str, problems: Sequence[str]):
        self.model, self.problems = model, tuple(problems)
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        super().__init__(
            str(path),
            f"not the weights of {model}: {shown}",
            "To allow differences, use revnets convert --allow",
            code="weights-mismatch",
        )

    def __reduce__(self):
        return MismatchError, (self.path, self.model, self.problems)


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor under both names."""

    ours: str
    official: str
    our_shape: TensorShape
    official_shape: TensorShape


@dataclass(frozen=True, slots=True)
class Names:
    """All tensors of a model under both names.

    Attributes:
        pairs: In the order of the model.
        unused: Official names and shapes without a counterpart: the gains of the first column, which have no effect.
    """

    pairs: tuple[Pair, ...]
    unused: dict[str, TensorShape]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(template))
    return re.compile(pattern.replace(r"\*", "(?P<rest>weight|bias)"))


def official_name(
    ours: str, rows: Iterable[Row], heads: Mapping[int, int] = MappingProxyType({})
) -> tuple[str, str] | None:
    """The official name of a tensor and the conversion of its shape, or None if it has no counterpart.

    Args:
        ours: Our name.
        rows: Of the table, which are searched.
        heads: Index of each head of intermediate supervision by its column.
    """
    for row in rows:
        if match := _pattern(row.ours).fullmatch(ours):
            numbers = match.groupdict()
            if "{head}" in row.official:
                numbers["head"] = str(heads[int(numbers["column"])])
            return row.official.replace("*", numbers.get("rest") or "").format_map(numbers), row.view
    return None


def _viewed(shape: TensorShape, view: str) -> TensorShape:
    return {"same": shape, "gain": (1, *shape, 1, 1), "conv": (*shape, 1, 1)}[view]


def names_of(model: RevCol | Supervised, layout: str = "classification") -> Names:
    """All names of a model.

    Args:
        model: With or without heads of intermediate supervision, possibly on the meta device.
        layout: `classification`, or `backbone`, which has no classifier.
    """
    net = model.model if isinstance(model, Supervised) else model
    rows, heads = BACKBONE, {}
    if isinstance(model, Supervised):
        heads = {stop.column: index for index, stop in enumerate(model.stops)}
        staged = any(".stages." in name for name in model.decoders.state_dict())
        rows += SUPERVISION + DECODERS["staged" if staged else "single"]
    elif layout == "classification":
        rows += CLASSIFIER
    pairs = []
    for name, tensor in model.state_dict().items():
        name = name.removeprefix("model.")
        if layout == "backbone" and name.startswith("head."):
            continue
        found = official_name(name, rows, heads)
        if found is None:
            raise ValueError(f"{name} has no name in the official code")
        pairs.append(Pair(name, found[0], tuple(tensor.shape), _viewed(tuple(tensor.shape), found[1])))
    unused = {f"subnet0.alpha{index}": (1, level.dim, 1, 1) for index, level in enumerate(net.spec.levels)}
    return Names(tuple(pairs), unused)


def check(
    expected: Mapping[str, TensorShape],
    given: Mapping[str, Tensor],
    allow: Sequence[str] = (),
    optional: Iterable[str] = (),
    path: object = "weights",
    model: str = "model",
) -> list[str]:
    """Check all names and shapes of a file.

    Args:
        expected: Names and shapes.
        given: Tensors of the file.
        allow: Names, or patterns such as `head.*`, that may be missing, unexpected or misshapen. They are omitted.
        optional: Names in `expected` that may be missing.
        path: For the message.
        model: For the message.

    Returns:
        The names that are present and fit, in the expected order.

    Raises:
        MismatchError: If a name or shape does not fit.
    """
    problems: dict[str, str] = {}
    for name, shape in expected.items():
        if name not in given:
            if name not in optional:
                problems[name] = f"missing {name}"
        elif tuple(given[name].shape) != shape:
            problems[name] = f"misshapen {name}: {tuple(given[name].shape)}, not {shape}"
    problems |= {name: f"unexpected {name}" for name in given if name not in expected}
    left = [text for name, text in problems.items() if not any(fnmatchcase(name, pattern) for pattern in allow)]
    if left:
        raise MismatchError(path, model, left)
    return [name for name in expected if name in given and name not in problems]


def to_ours(
    given: Mapping[str, Tensor], names: Names, allow: Sequence[str] = (), path: object = "weights", model: str = "model"
) -> dict[str, Tensor]:
    """Convert tensors under official names to our names, as views.

    Raises:
        MismatchError: If a name is missing or unexpected, or a shape differs, and is not allowed to.
    """
    expected = {pair.official: pair.official_shape for pair in names.pairs} | names.unused
    fitting = set(check(expected, given, allow, names.unused, path, model))
    return {pair.ours: given[pair.official].reshape(pair.our_shape) for pair in names.pairs if pair.official in fitting}


def to_official(given: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Convert tensors under our names to the official names, as views.

    The gains of the first column, which do not exist here, get their initial value of 0.5. A gain of 0, which is used
    as +0.001 here, becomes 0.001, because the official code would use 0.
    """
    state = {name: torch.full(shape, 0.5) for name, shape in names.unused.items()}
    for pair in names.pairs:
        if pair.ours in given:
            tensor = given[pair.ours].reshape(pair.official_shape)
            is_gain = pair.ours.endswith("gain.weight") and bool((tensor == 0).any())
            state[pair.official] = torch.where(tensor == 0, MIN_GAIN, tensor) if is_gain else tensor
    return state
