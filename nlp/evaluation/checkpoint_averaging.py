"""Average of the weights of several checkpoints, usually a better model than each of them."""

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
    """Select the newest checkpoints of a run.

    Args:
        folder: `--save-dir` of the run.
        last: Number of checkpoints.
        updates: Select checkpoints of updates (checkpoint_2_4000.pt) instead of epochs (checkpoint7.pt).

    Returns:
        Their paths, oldest first.

    Raises:
        TranslationError: If the run has fewer checkpoints.
    """
    pattern = re.compile(r"checkpoint_\d+_(\d+)\.pt" if updates else r"checkpoint(\d+)\.pt")
    if not folder.is_dir():
        raise TranslationError(f"{folder}: no such directory. Give the --save-dir of a run", code="missing-file")
    found = {int(match[1]): path for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    if len(found) < last:
        kind, keep = ("update", "--save-interval-updates") if updates else ("epoch", "--keep-last-epochs")
        raise TranslationError(
            f"{folder}: {len(found)} {kind} checkpoints, but {last} requested. Request fewer (--last), or train with "
            f"another {keep}",
            code="missing-file",
        )
    return [found[number] for number in sorted(found)[-last:]]


def average(paths: Iterable[Path], output: Path) -> None:
    """Write a checkpoint with the mean of the weights; everything else comes from the last checkpoint.

    Sums are computed in float64, and the mean is rounded once to the dtype of each tensor. Integers, such as counters,
    are not averaged. The optimizer state is dropped, because it does not match the mean.

    Args:
        paths: Checkpoints of fairseq-train.
        output: File to write.

    Raises:
        TranslationError: If a file is not a checkpoint, or if its weights have other names, shapes or types.
    """
    total: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    count = 0
    for count, path in enumerate(paths, 1):  # noqa: B007, used after the loop
        state = _load(path)
        model = state["model"]
        if total and (other := _shapes(model) ^ _shapes(total)):
            name, shape = min(other)
            raise TranslationError(
                f"{path}: {name} {shape} is not in all checkpoints. Average checkpoints of one run",
                code="weights-mismatch",
            )
        if name := next((name for name in total if _is_averaged(model[name]) != _is_averaged(total[name])), None):
            raise TranslationError(
                f"{path}: {name} has another dtype than in other checkpoints. Average checkpoints of one run",
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
        hint = error.hint if error.code in ("missing-file", "unreadable-file") else "Give a checkpoint of fairseq-train"
        raise TranslationError(f"{path}: {error.message}. {hint}", code=error.code) from None
    model = state.get("model") if isinstance(state, dict) else None
    is_model = isinstance(model, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in model.items()
    )
    if not model or not is_model:
        raise TranslationError(
            f"{path}: no key `model` with a mapping to tensors. Give a checkpoint of fairseq-train",
            code="wrong-format",
        )
    return state
