"""Checkpoints: written in full or not at all, safe to load, and enough to go on as if nothing had happened."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from revnets.utils.atomic_files import link, make_folder, remove_leftovers, replacing, replacing_folder, temporary_path
from revnets.utils.checkpoint_io import CheckpointReadError, read_checkpoint
from vision.checkpoints.sharding import DIVISIBLE, STATE, Piece, copy_into, divided, gathered, read_shards, shard_name
from vision.distributed.context import World
from vision.errors import CheckpointError as CheckpointError
from vision.errors import why_not_written

FORMAT = 2
"""Version of the layout. A reader refuses those that it does not know."""

KEYS = ("format", "versions", "config", "world", "progress", "scaler", *DIVISIBLE)
"""What a checkpoint holds.

Newer ones also have `classes`, their names. There is no state of the schedule, of the sampler, and of the generators of
random numbers: all are functions of the seed and of `progress`, see `vision.data.samplers`.
"""

_HINTS = {
    "damaged-file": "Use an older checkpoint",
    "wrong-format": "Use a file that `revnets train` wrote",
    "unsafe-file": "Use a file that `revnets train` wrote",
}
"""What helps where a checkpoint cannot be read, by the code of the failure."""

_STEP = re.compile(r"step-(\d+)(\.pt)?")


class Checkpoints:
    """The checkpoints of one run: the last `keep` of them as `step-N.pt`, and `best.pt`; folders if in shards.

    Args:
        folder: where they lie.
        keep: how many of the last stay. The best is a second name for one of them or for one that has gone.
        sharded: every process writes a file of its own.
        world: the processes of the run.
    """

    def __init__(self, folder: Path, keep: int, sharded: bool = False, world: World | None = None):
        self.folder, self.keep, self.world = folder, keep, world or World()
        self.suffix = "" if sharded else ".pt"

    @property
    def best(self) -> Path:
        """The best one; of a run that went from whole files to shards or back, the newer of the two."""
        there = [path for path in (self.folder / "best.pt", self.folder / "best") if path.exists()]
        return max(there, key=lambda path: path.stat().st_mtime_ns, default=self.folder / f"best{self.suffix}")

    def all(self) -> list[Path]:
        """The last checkpoints, oldest first.

        Raises:
            CheckpointError: the folder is there, but cannot be listed. It may hold a run.
        """
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            problem = f"this folder cannot be listed ({error.strerror})"
            raise CheckpointError(self.folder, problem, "Check its permissions", code="unreadable-file") from error
        return sorted((self.folder / name for name in names if _STEP.fullmatch(name)), key=step_of)

    def remove_leftovers(self, exclusive: bool = False) -> None:
        """Delete what killed runs have left half-written; `exclusive` as in `revnets.utils.atomic_files`."""
        remove_leftovers(self.folder, exclusive=exclusive)

    def save(self, state: Mapping[str, Any], best: bool = False) -> Path:
        """Write a checkpoint, then drop those beyond `keep`. All processes call it together.

        Args:
            state: with the keys `KEYS`; `state["progress"]["step"]` gives the name.
            best: let the best one be this.

        Raises:
            CheckpointError: it could not be written. Those before it are untouched.
        """
        path = self.folder / f"step-{state['progress']['step']:07d}{self.suffix}"
        if self.suffix:
            state = gathered(state, keep=self.world.is_main)
            self.world.by_main(lambda: self._guarded(path, lambda: save_file(path, state)))
        else:
            self._save_shards(path, state)
        self.world.by_main(lambda: self._guarded(path, lambda: self._tidy(path, best)))
        return path

    def _save_shards(self, path: Path, state: Mapping[str, Any]) -> None:
        """Every process fills a folder that is only given its name when all are done."""
        world, filling = self.world, self.world.by_main(lambda: temporary_path(path.with_name(f"{path.name}.shards")))
        rest, parts = divided(state)

        def begin() -> None:
            make_folder(self.folder)
            shutil.rmtree(filling, ignore_errors=True)
            filling.mkdir()

        def write() -> None:
            save_file(filling / shard_name(world.rank, world.size), parts)
            if world.is_main:
                save_file(filling / STATE, {**rest, "shards": world.size})

        def finish() -> None:
            if error is not None:
                shutil.rmtree(filling, ignore_errors=True)
                raise error
            with replacing_folder(path) as empty:
                empty.rmdir()
                os.rename(filling, empty)

        world.by_main(lambda: self._guarded(path, begin))
        error = next((error for error in world.collect(self._attempt(path, write)) if error is not None), None)
        world.by_main(lambda: self._guarded(path, finish))

    def _attempt(self, path: Path, work: Callable[[], None]) -> CheckpointError | None:
        try:
            self._guarded(path, work)
        except CheckpointError as error:
            return error
        return None

    def _guarded(self, path: Path, work: Callable[[], None]) -> None:
        try:
            work()
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
            if isinstance(error, CheckpointError):
                raise
            before = self.all()
            kept = f"{before[-1]} is intact" if before else "there is none before it"
            problem = f"cannot be written ({why_not_written(error)}); {kept}"
            raise CheckpointError(
                path, problem, "Free some space, then go on with resume=auto", code="unwritable-file"
            ) from error

    def _tidy(self, path: Path, best: bool) -> None:
        remove_leftovers(self.folder)
        if best:
            self.name_best(path)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def name_best(self, path: Path) -> None:
        """Let `best.pt`, or the folder `best`, be this checkpoint."""
        make_folder(self.folder)
        if path.is_dir():
            with replacing_folder(self.folder / "best") as folder:
                for file in path.iterdir():
                    link(file, folder / file.name)
        else:
            link(path, self.folder / "best.pt")


def save_file(path: Path, content: Mapping[str, Any]) -> None:
    """One file, whole or not at all.

    Raises:
        OSError, RuntimeError: no space and the like.
    """
    with replacing(path) as file:
        torch.save(dict(content), file)


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


def step_of(path: Path) -> int:
    """The number of updates that the name of a checkpoint tells; -1 if it tells none."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


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
    from vision.checkpoints.layout import require_layout  # new runs read nothing

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


def versions() -> dict[str, str]:
    """What a checkpoint was made with."""
    import platform

    import numpy
    import timm

    import revnets

    return {
        "revnets": revnets.__version__,
        "torch": str(torch.__version__),  # it is a str with a class of its own, which a safe load refuses
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
