"""The layout of a checkpoint of `revnets train`, against which a file is validated before it is used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from vision.checkpoints.sharding import DIVISIBLE, Piece
from vision.errors import CheckpointError

KEYS = ("format", "versions", "config", "world", "progress", "scaler", *DIVISIBLE)
"""Keys of a checkpoint.

Newer checkpoints also have `classes` (class names), `provenance` (of soft labels and excluded images, by keys of the
configuration) and, for detectors, `category_ids` (of COCO). There is no state of the schedule, of the sampler or of
random number generators, because all are functions of the seed and of `progress`, see `vision.data.samplers`.
"""

MAX_COUNT = 2**40
"""Limit of updates, epochs and processes."""

PROGRESS = ("epoch", "step", "best", "best_step", "losses")
HYPERPARAMETERS = (bool, int, float, str, type(None))

Kind = tuple[str, Callable[[Any], bool]]


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _is_count(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value <= MAX_COUNT


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) in (str, int) and _is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in (str, int, float, bool, type(None))


def _holds(kinds: type | tuple[type, ...]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, Mapping) and all(type(key) is str and isinstance(item, kinds) for key, item in value.items())
    )


_holds_tensors = _holds((Tensor, Piece))

_COUNT: Kind = ("a whole number of at least 0", _is_count)
_POSITIVE: Kind = ("a whole number of at least 1", lambda value: _is_count(value, 1))
_MAPPING: Kind = ("a mapping", lambda value: isinstance(value, Mapping))
_TENSORS: Kind = ("a mapping of tensors", _holds_tensors)
_WEIGHTS: Kind = ("a mapping of tensors", lambda value: isinstance(value, Tensor) or _holds_tensors(value))

KINDS: dict[str, Kind] = {
    "format": _COUNT,
    "versions": ("a mapping of strings", _holds(str)),
    "config": ("a mapping of plain values", lambda value: type(value) is dict and _is_plain(value)),
    "config.optimizer": _MAPPING,
    "config.grad_accum": _POSITIVE,
    "config.workers": _COUNT,
    "world": _POSITIVE,
    "provenance": (
        "a mapping of plain values",
        lambda value: type(value) is dict and _is_plain(value) and all(type(key) is str for key in value),
    ),
    "classes": (
        "a list of names",
        lambda value: type(value) in (list, tuple) and all(type(name) is str for name in value),
    ),
    "category_ids": (
        "a list of whole numbers of at least 0",
        lambda value: type(value) in (list, tuple) and all(map(_is_count, value)),
    ),
    "progress": (
        f"a mapping of {', '.join(PROGRESS)}",
        lambda value: isinstance(value, Mapping) and all(key in PROGRESS for key in value),
    ),
    "progress.epoch": _COUNT,
    "progress.step": _COUNT,
    "progress.best": ("a number", _is_number),
    "progress.best_step": ("a whole number of at least -1", lambda value: _is_count(value, -1)),
    "progress.losses": (
        "a tensor with one axis",
        lambda value: isinstance(value, Tensor) and value.ndim == 1 and value.is_floating_point(),
    ),
    "model": _WEIGHTS,
    "ema": _WEIGHTS,
    "heads": _TENSORS,
    "heads_ema": _TENSORS,
    "optimizer": _MAPPING,
    "optimizer.state": (
        "a mapping of numbers to mappings",
        lambda value: (
            isinstance(value, Mapping)
            and all(_is_count(key) and isinstance(entry, Mapping) for key, entry in value.items())
        ),
    ),
    "optimizer.param_groups": (
        "a list of mappings",
        lambda value: (
            type(value) is list
            and all(isinstance(group, Mapping) and type(group.get("params")) is list for group in value)
        ),
    ),
    "scaler": ("a mapping of numbers", _holds((int, float))),
}
"""The expected kind of each entry that is neither None nor missing."""

TO_EVALUATE = ("config", "model")
TO_RESUME = (
    *("config", "world", "model", "heads", "heads_ema", "scaler", "progress", "optimizer"),
    *("config.optimizer", "config.grad_accum", "config.workers"),
    *(f"progress.{key}" for key in PROGRESS),
    *("optimizer.state", "optimizer.param_groups"),
)
"""Entries that may be neither None nor missing."""


def require_layout(state: Mapping[str, Any], path: Path, needed: Iterable[str] = ()) -> None:
    """Refuse a checkpoint with a missing entry or one of the wrong kind.

    Args:
        state: The checkpoint.
        path: Of the checkpoint, for the message.
        needed: Entries that may be neither None nor missing.

    Raises:
        CheckpointError: If an entry is missing or of the wrong kind.
    """
    for place, (kind, fits) in KINDS.items():
        value = _at(state, place)
        if value is not None and not fits(value):
            raise _wrong(path, f"its `{place}` is not {kind}")
    needed = tuple(needed)
    for place in needed:
        if _at(state, place) is None:
            raise _wrong(path, f"it has no `{place}`")
    progress = state["progress"]
    if "progress.losses" in needed and max(progress["epoch"], progress["losses"].numel()) > progress["step"]:
        raise _wrong(path, f"its `progress.step` is {progress['step']}, less than its number of epochs or losses")


def _at(state: Mapping[str, Any], place: str) -> Any:
    value: Any = state
    for key in place.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def require_optimizer(saved: Mapping[str, Any], own: Optimizer, path: Path) -> None:
    """Refuse the state of another optimizer or of other parameters, most of which `load_state_dict` does not check.

    Args:
        saved: The entry `optimizer` of a checkpoint.
        own: The optimizer of the run.
        path: Of the checkpoint, for the message.

    Raises:
        CheckpointError: If the state does not fit the optimizer.
    """
    groups, theirs = own.param_groups, saved["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in theirs]:
        raise _wrong(path, "its optimizer has other groups of parameters", "weights-mismatch")
    for group, given in zip(groups, theirs, strict=True):
        for name, value in group.items():
            same = isinstance(value, tuple)  # such as betas, which the configuration sets
            if (
                name in given
                and name != "params"
                and not (_is_alike(value, given[name]) and (not same or _is_same(value, given[name])))
            ):
                raise _wrong(path, f"`{name}` of its optimizer is of another kind")
    indices = [index for group in theirs for index in group["params"]]
    if not all(type(index) is int for index in indices) or indices != list(range(len(indices))):
        raise _wrong(path, "the parameters of its optimizer are not numbered from 0")
    expected = _states(own)
    for index, entry in saved["state"].items():
        if index >= len(expected):
            raise _wrong(path, f"its optimizer has no parameter {index}", "weights-mismatch")
        for name, value in expected[index].items():
            if name not in entry:
                raise _wrong(path, f"its optimizer has no `{name}` of parameter {index}")
            if not _is_alike(value, entry[name]):
                raise _wrong(path, f"`{name}` of parameter {index} in its optimizer is of another kind or shape")


def _is_same(numbers: tuple[Any, ...], given: Any) -> bool:
    """Whether the values are equal numbers. Tensors, whose comparison is not a single value, are not."""
    return all(isinstance(number, (int, float)) for number in given) and numbers == tuple(given)


def _states(own: Optimizer) -> list[dict[str, Any]]:
    """The state that an optimizer keeps for each parameter, found by a step of an equal optimizer on meta tensors."""
    groups = [{**group, "params": [_without_memory(item) for item in group["params"]]} for group in own.param_groups]
    parameters = [parameter for group in groups for parameter in group["params"]]
    try:
        other = type(own)(groups)  # type: ignore[call-arg]
        other.step()
    except Exception:  # some need other arguments, or values
        return [{} for _ in parameters]
    return [dict(other.state[parameter]) for parameter in parameters]


def _without_memory(parameter: Tensor) -> Tensor:
    with torch.device("meta"):
        other = torch.empty(parameter.shape, dtype=parameter.dtype, requires_grad=True)
        other.grad = torch.empty(parameter.shape, dtype=parameter.dtype)
    return other


def _is_alike(own: Any, given: Any) -> bool:
    """Whether a value can replace another: a number, a tensor of the same shape, or a switch."""
    if isinstance(own, (tuple, list)):
        return isinstance(given, (tuple, list)) and len(own) == len(given) and all(map(_is_alike, own, given))
    if isinstance(given, (Tensor, Piece)):
        return isinstance(own, Tensor) and own.shape == given.shape
    if isinstance(own, Tensor):
        return own.ndim == 0 and _is_number(given)
    if type(given) not in HYPERPARAMETERS or (isinstance(given, float) and not math.isfinite(given)):
        return False
    if own is None or given is None:
        return not isinstance(given, str)
    return isinstance(own, str) == isinstance(given, str)


def _wrong(path: Path, problem: str, code: str = "wrong-format") -> CheckpointError:
    return CheckpointError(path, problem, "Use a file that `revnets train` wrote for this model", code=code)
