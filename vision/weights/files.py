"""Weight files in our or in the official layout, read without executing their content."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from revnets.utils.checkpoint_io import CheckpointReadError, read_checkpoint
from vision.errors import CheckpointError


class Nothing:
    """Replaces objects in a file that weights do not need. It accepts and ignores any arguments."""

    def __new__(cls, *args: Any) -> Nothing:
        return super().__new__(cls)

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


STAND_INS: tuple[tuple[Any, str], ...] = (
    # The official trainer saves its configuration, which an OrderedDict can also read, and by mistake the function
    # `input`.
    (Nothing, "builtins.input"),
    (OrderedDict, "yacs.config.CfgNode"),
    # Accuracies may have been saved as NumPy scalars.
    (Nothing, "numpy.core.multiarray.scalar"),
    (Nothing, "numpy._core.multiarray.scalar"),
    (Nothing, "numpy.dtype"),
)
"""Replacements of what a pickled checkpoint may name in addition to plain data and tensors."""

_HINTS = {"not-a-file": "Give a file; revnets reshard converts shards", "damaged-file": "Download the file again"}
"""Hints for files that cannot be read, by the code of the error."""

WEIGHTS = ("raw", "ema")


class Weights(NamedTuple):
    """The tensors of a file.

    Attributes:
        tensors: By name, without a common prefix.
        layout: `ours`, `classification`, or `backbone` of a detector or segmenter.
        around: Names of tensors outside of a backbone.
    """

    tensors: dict[str, Tensor]
    layout: str
    around: tuple[str, ...] = ()


def read(path: Path | str) -> Any:
    """Read a .safetensors file or a file of `torch.save`. Nothing in it is executed.

    Raises:
        CheckpointError: If the file does not exist, cannot be read, is damaged, or names objects that are not allowed.
    """
    try:
        return read_checkpoint(path, allowed=STAND_INS, mmap=True)
    except CheckpointReadError as error:
        raise CheckpointError(path, error.message, _HINTS.get(error.code, error.hint), code=error.code) from None


def select(content: Any, weights: str = "raw", path: Path | str = "weights") -> Weights:
    """Select the tensors of a RevCol from the content of a file.

    Args:
        content: A dict of tensors, or a checkpoint of the official trainer, of OpenMMLab or of `revnets train`.
        weights: `raw` or `ema`, the average over training.
        path: For messages.

    Raises:
        CheckpointError: If the file has no such tensors.
    """
    state = tensors_in(content, weights, path)
    if any(name.startswith("backbone.subnet") for name in state):
        around = tuple(name for name in state if not name.startswith("backbone."))
        inside = {name.removeprefix("backbone."): value for name, value in state.items() if name not in set(around)}
        return Weights(inside, "backbone", around)
    if any(name.startswith("subnet") for name in state):
        is_headless = not any(name.startswith("cls") for name in state)
        return Weights(state, "backbone" if is_headless else "classification")
    if any(name.startswith("columns.cells.") for name in state):
        return Weights(state, "ours")
    raise CheckpointError(path, "it has no columns of RevCol", "Give a checkpoint of RevCol", code="missing-weights")


def tensors_in(content: Any, weights: str = "raw", path: Path | str = "weights") -> dict[str, Tensor]:
    """Select the tensors of any model from the content of a file; see `select`.

    Raises:
        CheckpointError: If the file has no such tensors.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(path, "not a dict of weights", "Give a checkpoint of RevCol")
    state = dict(_chosen(content, weights, path))
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(path, f"{name!r} is not a tensor", "Give a checkpoint of RevCol")
    for wrapper in ("module.", "_orig_mod."):
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def class_count(tensors: Mapping[str, Tensor]) -> int:
    """Number of classes of the weights of a RevCol, under our or the official names; 0 without a classifier."""
    for key in ("cls.classifier.1.bias", "cls_blocks.3.classifier.1.bias", "head.fc.bias"):
        if key in tensors:
            return tensors[key].numel()
    return 1000 if any(key.startswith(("cls", "head.fc")) for key in tensors) else 0


def channels_in(tensors: Mapping[str, Tensor]) -> int:
    """Number of image channels of the weights of a RevCol; 3 if there is no stem."""
    stems = (tensors.get(key) for key in ("stem.0.weight", "stem.conv.weight"))
    return next((stem.shape[1] for stem in stems if stem is not None and stem.dim() == 4), 3)


def _chosen(content: Mapping[str, Any], weights: str, path: Path | str) -> Mapping[str, Any]:
    is_run = "progress" in content and "ema" in content  # of `revnets train`
    if weights == "ema":
        state = content["ema"] if is_run else content.get("state_dict_ema")
    else:
        state = content.get("model") if is_run else content.get("model", content.get("state_dict", content))
    is_absent = state is None or (isinstance(state, Mapping) and not state)
    if weights == "ema" and is_absent:
        raise CheckpointError(path, "it has no averaged weights", "Use those of the model: raw", code="missing-weights")
    heads = content.get("heads_ema" if weights == "ema" else "heads") if is_run else None
    heads = {} if heads is None else heads
    if not isinstance(state, Mapping) or not isinstance(heads, Mapping):
        raise CheckpointError(path, "not a dict of weights", "Give a checkpoint of RevCol")
    return {**state, **heads}
