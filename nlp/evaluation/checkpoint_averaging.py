"""The average of checkpoints: one model, usually better than each of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from revnets.utils.atomic_files import replacing
from revnets.utils.checkpoint_io import RECORDS, CheckpointReadError, read_checkpoint

from ..data.corpus import TranslationError


def select_checkpoints(folder: Path, last: int, updates: bool = False) -> list[Path]:
    """The newest checkpoints of a run: of its last epochs (checkpoint7.pt), or updates (checkpoint_2_4000.pt).

    Raises:
        TranslationError: there are fewer.
    """
    pattern = re.compile(r"checkpoint_\d+_(\d+)\.pt" if updates else r"checkpoint(\d+)\.pt")
    if not folder.is_dir():
        raise TranslationError(f"{folder}: there is no such folder. Give the --save-dir of a run", code="missing-file")
    found = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    if len(found) < last:
        kind, keep = ("update", "--save-interval-updates") if updates else ("epoch", "--keep-last-epochs")
        raise TranslationError(
            f"{folder}: {len(found)} checkpoints of {kind}s, {last} are wanted. Ask for fewer (--last), or train with "
            f"other {keep}",
            code="missing-file",
        )
    return [found[number] for number in sorted(found)[-last:]]


def average(paths: Iterable[Path], output: Path) -> None:
    """Write a checkpoint of the mean weights. All else in it comes from the last of the checkpoints.

    Sums are in float64, and the mean has each tensor's own type. Integers, such as counters, are not averaged, and the
    optimizer's state is dropped: it belongs to no average.

    Raises:
        TranslationError: a file is no checkpoint, or has other weights than the rest.
    """
    total: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    count = 0
    for count, path in enumerate(paths, 1):  # noqa: B007, it is the number of them afterwards
        state = _load(path)
        model = state["model"]
        if total and (other := _shapes(model) ^ _shapes(total)):
            name, shape = min(other)
            raise TranslationError(
                f"{path}: {name} {shape} is not in all of them. Average checkpoints of one run", code="weights-mismatch"
            )
        if name := next((name for name in total if _is_averaged(model[name]) != _is_averaged(total[name])), None):
            raise TranslationError(
                f"{path}: {name} is of another type than before. Average checkpoints of one run",
                code="weights-mismatch",
            )
        for name, tensor in model.items():
            if not _is_averaged(tensor):
                total[name] = tensor
            elif name in total:
                total[name] += tensor
            else:
                total[name] = tensor.to(torch.float64, copy=True)
    for name, tensor in state["model"].items():
        if _is_averaged(tensor):
            state["model"][name] = (total[name] / count).to(tensor.dtype)
    state["last_optimizer_state"] = None
    with replacing(output) as file:
        torch.save(state, file)


def _is_averaged(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _shapes(tensors: dict[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(tensor.shape)) for name, tensor in tensors.items()}


def _load(path: Path) -> dict[str, Any]:
    try:
        state = read_checkpoint(path, allowed=RECORDS)
    except CheckpointReadError as error:
        hint = error.hint if error.code in ("missing-file", "unreadable-file") else "Give one of fairseq-train"
        raise TranslationError(f"{path}: {error.message}. {hint}", code=error.code) from None
    model = state.get("model") if isinstance(state, dict) else None
    is_model = isinstance(model, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in model.items()
    )
    if not model or not is_model:
        raise TranslationError(
            f"{path}: has no `model` in it, a mapping to tensors. Give a checkpoint of fairseq-train",
            code="wrong-format",
        )
    return state
