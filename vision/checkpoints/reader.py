"""Reading checkpoints: nothing in them is executed, and all is compared with what should be there."""

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
"""What helps where a checkpoint cannot be read, by the code of the failure."""


def in_run(path: Path) -> Path:
    """The checkpoint that a path means: of the folder of a run the best one, or the last if none is marked as it.

    Raises:
        CheckpointError: the folder is neither a checkpoint nor a run, or cannot be read.
    """
    try:
        if not path.is_dir() or (path / STATE).exists():
            return path
        run = Checkpoints(path / "checkpoints", keep=1)
        for candidate in (run.best, *reversed(run.all())):
            if candidate.exists():
                return candidate
    except OSError as error:
        problem = f"this folder cannot be read ({error.strerror})"
        raise CheckpointError(path, problem, "Check its permissions", code="unreadable-file") from error
    raise CheckpointError(path, "this folder holds no checkpoints", "Give a run, or a checkpoint", code="missing-file")


def read(path: Path, world: World | None = None, needed: Iterable[str] = ()) -> dict[str, Any]:
    """Load a checkpoint into the memory of the CPU. Nothing in it is executed.

    Args:
        world: if several processes read it, each reads only what it needs: files are mapped into memory, and from a
            folder of as many shards each reads its own, as `Piece`s.
        needed: entries that may be neither None nor missing, such as `vision.checkpoints.layout.TO_RESUME`.

    Raises:
        CheckpointError: no such file, no access, truncated, not one of ours, it holds more than plain data, or an entry
            is of another kind than it should be.
    """
    world = world or World()
    if path.is_dir():
        if not (path / STATE).exists():
            raise CheckpointError(
                path,
                f"this folder has no {STATE}",
                "Give a checkpoint, a .pt file or a step-N folder",
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
                path, "its shards do not belong together", "Use an older checkpoint", code="damaged-file"
            ) from None
    else:
        state = _load(path, mmap=world.size > 1)
    missing = [key for key in KEYS if not isinstance(state, dict) or key not in state]
    number = state.get("format", FORMAT) if isinstance(state, dict) else FORMAT
    if type(number) is int and number != FORMAT:
        text = f"layout {number}, but this version reads {FORMAT}"
        raise CheckpointError(path, text, "Use the version of revnets that wrote it", code="version-mismatch")
    if missing:
        problem = f"not a checkpoint of a training run: {', '.join(missing)} missing"
        raise CheckpointError(path, problem, "Use a file that `revnets train` wrote")
    require_layout(state, path, needed)
    return state


def _load(path: Path, mmap: bool) -> Any:
    try:
        return read_checkpoint(path, mmap=mmap)
    except CheckpointReadError as error:
        raise CheckpointError(path, error.message, _HINTS.get(error.code, error.hint), code=error.code) from None


def load_weights(model: nn.Module, weights: Mapping[str, Tensor | Piece], path: Path) -> None:
    """Put weights into a model.

    Raises:
        CheckpointError: they are those of another model; says where the two part.
    """
    _fill(model.state_dict(), weights, path)


def load_heads(heads: Mapping[str, Tensor], weights: Mapping[str, Tensor | Piece], path: Path) -> None:
    """Put weights into what trains beside a model (`timm.task.TrainingTask.get_task_state`), such as heads.

    Raises:
        CheckpointError: they are those of other heads.
    """
    _fill(heads, weights, path)


def _fill(own: Mapping[str, Tensor], weights: Mapping[str, Tensor | Piece], path: Path) -> None:
    remedy = "Use its own configuration, or another output"
    if not isinstance(weights, Mapping):
        raise CheckpointError(path, "it holds no weights by name", remedy)
    for name, tensor in own.items():
        given = weights.get(name)
        if given is None:
            raise CheckpointError(path, f"of another model: it lacks {name}", remedy, code="weights-mismatch")
        if given.shape != tensor.shape:
            problem = f"of another model: {name} has the shape {tuple(given.shape)}, not {tuple(tensor.shape)}"
            raise CheckpointError(path, problem, remedy, code="weights-mismatch")
        dtype = given.local.dtype if isinstance(given, Piece) else given.dtype
        if dtype.is_floating_point != tensor.is_floating_point():
            problem = f"of another model: {name} is of the type {dtype}, not {tensor.dtype}"
            raise CheckpointError(path, problem, remedy, code="weights-mismatch")
    if extra := sorted(set(weights) - set(own)):
        raise CheckpointError(path, f"of another model: it also has {extra[0]}", remedy, code="weights-mismatch")
    for name, tensor in own.items():
        copy_into(tensor, weights[name])
