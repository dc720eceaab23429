"""Reading of checkpoints. Nothing in them is executed, and every entry is validated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from revnets.utils.checkpoint_io import CheckpointReadError, read_checkpoint
from vision.checkpoints.layout import KEYS, require_layout
from vision.checkpoints.manager import FORMAT, Checkpoints
from vision.checkpoints.sharding import STATE, Piece, copy_into, read_shards
from vision.distributed.context import World
from vision.errors import CheckpointError

_HINTS = {
    "damaged-file": "Use an older checkpoint",
    "wrong-format": "Use a file that `revnets train` wrote",
    "unsafe-file": "Use a file that `revnets train` wrote",
}
"""Hints for checkpoints that cannot be read, by the code of the error."""


def in_run(path: Path) -> Path:
    """The checkpoint of a path: for the directory of a run its best one, or the last if none is marked as best.

    Raises:
        CheckpointError: If the directory is neither a checkpoint nor a run, or cannot be read.
    """
    try:
        if not path.is_dir() or (path / STATE).exists():
            return path
        run = Checkpoints(path / "checkpoints", keep=1)
        for candidate in (run.best, *reversed(run.all())):
            if candidate.exists():
                return candidate
    except OSError as error:
        problem = f"the directory cannot be read ({error.strerror})"
        raise CheckpointError(path, problem, "Check its permissions", code="unreadable-file") from error
    problem = "the directory has no checkpoints"
    raise CheckpointError(path, problem, "Give a run or a checkpoint", code="missing-file")


def read(path: Path, world: World | None = None, needed: Iterable[str] = ()) -> dict[str, Any]:
    """Load a checkpoint into CPU memory. Nothing in it is executed.

    Args:
        path: Of the checkpoint.
        world: The processes that read it. Each reads only what it needs: files are memory-mapped, and from a directory
            with one shard per process each reads its own shard, as `Piece`s.
        needed: Entries that may be neither None nor missing, such as `vision.checkpoints.layout.TO_RESUME`.

    Raises:
        CheckpointError: If the file does not exist, cannot be read, is truncated, is not a checkpoint of a run, holds
            more than plain data, or has an entry of the wrong kind.
    """
    world = world or World()
    if path.is_dir():
        if not (path / STATE).exists():
            raise CheckpointError(
                path,
                f"the directory has no {STATE}",
                "Give a checkpoint: a .pt file or a step-N directory",
                code="missing-file",
            )
        try:
            state = read_shards(
                path, lambda file: _load(file, mmap=True), world.rank, world.size if world.size > 1 else 0
            )
        except CheckpointError:
            raise
        except Exception:  # entries of any other kind
            raise CheckpointError(
                path, "its shards do not match each other", "Use an older checkpoint", code="damaged-file"
            ) from None
    else:
        state = _load(path, mmap=world.size > 1)
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    number = state.get("format", FORMAT) if isinstance(state, dict) else FORMAT
    if type(number) is int and number != FORMAT:
        text = f"it has the layout {number}, but this version of revnets reads {FORMAT}"
        raise CheckpointError(path, text, "Use the version of revnets that wrote it", code="version-mismatch")
    if missing:
        problem = f"not a checkpoint of a training run: it has no {', '.join(missing)}"
        raise CheckpointError(path, problem, "Use a file that `revnets train` wrote")
    require_layout(state, path, needed)
    return state


def _load(path: Path, mmap: bool) -> Any:
    try:
        return read_checkpoint(path, mmap=mmap)
    except CheckpointReadError as error:
        raise CheckpointError(path, error.message, _HINTS.get(error.code, error.hint), code=error.code) from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor | Piece], path: Path) -> None:
    """Load weights into a model.

    Raises:
        CheckpointError: If the weights are those of another model.
    """
    _fill(model.state_dict(), weights, path)


def load_heads(heads: Mapping[str, Tensor], weights: Mapping[str, Tensor | Piece], path: Path) -> None:
    """Load weights of modules that are trained with a model (`timm.task.TrainingTask.get_task_state`), such as heads.

    Raises:
        CheckpointError: If the weights are those of other heads.
    """
    _fill(heads, weights, path)


def _fill(own: Mapping[str, Tensor], weights: Mapping[str, Tensor | Piece], path: Path) -> None:
    hint = "Use the configuration of the checkpoint, or another output"
    if not isinstance(weights, Mapping):
        raise CheckpointError(path, "it has no weights by name", hint)
    for name, tensor in own.items():
        given = weights.get(name)
        if given is None:
            raise CheckpointError(path, f"it is of another model: no {name}", hint, code="weights-mismatch")
        if given.shape != tensor.shape:
            problem = f"it is of another model: {name} has the shape {tuple(given.shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(path, problem, hint, code="weights-mismatch")
        dtype = given.local.dtype if isinstance(given, Piece) else given.dtype
        if dtype.is_floating_point != tensor.is_floating_point():
            problem = f"it is of another model: {name} has the type {dtype}, not {tensor.dtype}"
            raise CheckpointError(path, problem, hint, code="weights-mismatch")
    if extra := sorted(set(weights) - set(own)):
        raise CheckpointError(path, f"it is of another model: extra {extra[0]}", hint, code="weights-mismatch")
    for name, tensor in own.items():
        copy_into(tensor, weights[name])
