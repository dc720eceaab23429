"""The built-in models, and recognition of the model of a weight file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from revnets import NetSpec, load_spec
from vision.errors import CheckpointError
from vision.paths import MODELS

_BLOCK = re.compile(r"subnet(\d+)\.level(\d+)\.blocks\.(\d+)\.dwconv\.weight")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes that identify a convolutional model, and its kernel size, which may vary."""

    columns: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    is_huge: bool  # level 0 also reads the top level
    kernel_size: int = 3


@cache
def family() -> dict[str, NetSpec]:
    """The convolutional models by name, which also exist in the official code."""
    specs = {path.stem: load_spec(path) for path in sorted(MODELS.glob("*.yaml"))}
    return {name: spec for name, spec in specs.items() if all(level.block == "convnext" for level in spec.levels)}


def spec_of(name: str, kernel_size: int = 3) -> NetSpec:
    """The specification of a model with kernels of this size."""
    path = MODELS / f"{name}.yaml"
    return load_spec(path, [f"levels.{index}.kernel_size={kernel_size}" for index in range(len(family()[name].levels))])


def shape_of(spec: NetSpec, kernel_size: int = 3) -> Shape:
    """The shape of a specification."""
    dims, depths = tuple(level.dim for level in spec.levels), tuple(level.depth for level in spec.levels)
    return Shape(spec.columns, dims, depths, any("top" in (level.reads or ()) for level in spec.levels), kernel_size)


def shape_in(tensors: Mapping[str, Tensor]) -> Shape | None:
    """The shape of a model by its tensors under official names, by majority if columns differ; None if unknown."""
    columns, depths = 0, Counter[int]()
    dims, kernels = Counter[tuple[int, int]](), Counter[int]()
    for name, tensor in tensors.items():
        if (match := _BLOCK.fullmatch(name)) and tensor.dim() == 4:
            column, level, block = map(int, match.groups())
            columns, depths[level] = max(columns, column + 1), max(depths[level], block + 1)
            dims[level, tensor.shape[0]] += 1
            kernels[tensor.shape[-1]] += 1
    if not columns or sorted(depths) != list(range(len(depths))):
        return None
    widths = tuple(max((count, dim) for (at, dim), count in dims.items() if at == level)[1] for level in sorted(depths))
    is_huge = any(".fusion.up2." in name for name in tensors)
    kernel_size = kernels.most_common(1)[0][0]
    return Shape(columns, widths, tuple(depths[level] for level in sorted(depths)), is_huge, kernel_size)


def recognize(found: Shape | None, path: object = "weights") -> str:
    """The name of the model that has a shape.

    Raises:
        CheckpointError: If no model has this shape.
    """
    if found is None:
        problem = "it does not have ConvNeXt blocks at every level, unlike all official models"
        raise CheckpointError(str(path), problem, "Give weights of a convolutional RevCol", code="unknown-model")
    for name, spec in family().items():
        if shape_of(spec, found.kernel_size) == found:
            return name
    text = f"{found.columns} columns of widths {found.dims} and depths {found.depths}"
    hint = "Name the model, as in --model revcol_tiny; other shapes need Python (docs/guides/training.md)"
    raise CheckpointError(str(path), f"no model of the family has {text}", hint, code="unknown-model")
