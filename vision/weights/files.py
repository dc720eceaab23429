"""Files of weights, read without running what they hold, in our layout or in the official one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from revnets.utils.checkpoint_io import CheckpointReadError, read_checkpoint
from vision.errors import CheckpointError


class Nothing:
    """Stands where a file names something that weights do not need. It takes any arguments and forgets them."""

    def __new__(cls, *args: Any) -> Nothing:
        return super().__new__(cls)

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


STAND_INS: tuple[tuple[Any, str], ...] = (
    # The official trainer saves its configuration, which an OrderedDict reads as well, and by mistake the function
    # `input`.
    (Nothing, "builtins.input"),
    (OrderedDict, "yacs.config.CfgNode"),
    # Accuracies may have been saved as numbers of NumPy.
    (Nothing, "numpy.core.multiarray.scalar"),
    (Nothing, "numpy._core.multiarray.scalar"),
    (Nothing, "numpy.dtype"),
)
"""What a pickled checkpoint may name beside plain data and tensors, and what is taken instead."""

_HINTS = {"not-a-file": "Give a file; revnets reshard makes one of shards", "damaged-file": "Fetch the file again"}
"""What helps where a file cannot be read, by the code of the failure."""

WEIGHTS = ("raw", "ema")


class Weights(NamedTuple):
    """The tensors of a file.

    Attributes:
        tensors: by name, without what the names of all begin with.
        layout: `ours`, `classification`, or `backbone` of a detector or segmenter.
        around: names of the tensors that stand beside a backbone.
    """

    tensors: dict[str, Tensor]
    layout: str
    around: tuple[str, ...] = ()


def read(path: Path | str) -> Any:
    """What a .safetensors file or a file of `torch.save` holds. Nothing in it is executed.

    Raises:
        CheckpointError: no such file, no access, damaged, or it names what weights do not need.
    """
    try:
        return read_checkpoint(path, allowed=STAND_INS, mmap=True)
    except CheckpointReadError as error:
        raise CheckpointError(path, error.message, _HINTS.get(error.code, error.hint), code=error.code) from None


def select(content: Any, weights: str = "raw", path: Path | str = "weights") -> Weights:
    """The tensors in what a file holds.

    Args:
        content: a dict of tensors; or a checkpoint of the official trainer, of OpenMMLab's, or of `revnets train`.
        weights: `raw` or `ema`, the average over training.
        path: for messages.

    Raises:
        CheckpointError: it does not hold them.
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
    raise CheckpointError(path, "it holds no columns of RevCol", "Give a checkpoint of RevCol", code="missing-weights")


def tensors_in(content: Any, weights: str = "raw", path: Path | str = "weights") -> dict[str, Tensor]:
    """The tensors in what a file holds, of RevCol or of any other model; see `select`.

    Raises:
        CheckpointError: it does not hold them.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(path, "not a dict of weights", "Give a checkpoint of RevCol")
    state = dict(_chosen(content, weights, path))
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(path, f"{name!r} is no tensor", "Give a checkpoint of RevCol")
    for wrapper in ("module.", "_orig_mod."):
        if state and all(name.startswith(wrapper) for name in state):
            state = {name.removeprefix(wrapper): value for name, value in state.items()}
    return state


def class_count(tensors: Mapping[str, Tensor]) -> int:
    """How many classes the weights of a RevCol are for, under our names or the official ones; 0: no classifier."""
    for key in ("cls.classifier.1.bias", "cls_blocks.3.classifier.1.bias", "head.fc.bias"):
        if key in tensors:
            return tensors[key].numel()
    return 1000 if any(key.startswith(("cls", "head.fc")) for key in tensors) else 0


def channels_in(tensors: Mapping[str, Tensor]) -> int:
    """How many channels the images have that the weights of a RevCol are for; 3 if they do not tell."""
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
        raise CheckpointError(
            path, "it holds no averaged weights", "Take those of the model: raw", code="missing-weights"
        )
    heads = content.get("heads_ema" if weights == "ema" else "heads") if is_run else None
    heads = {} if heads is None else heads
    if not isinstance(state, Mapping) or not isinstance(heads, Mapping):
        raise CheckpointError(path, "not a dict of weights", "Give a checkpoint of RevCol")
    return {**state, **heads}
