"""The checkpoints of a run: written atomically, with retention of the latest and the best."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from revnets.utils.atomic_files import link, make_folder, remove_leftovers, replacing, replacing_folder, temporary_path
from vision.distributed.context import World
from vision.errors import CheckpointError as CheckpointError
from vision.errors import why_not_written

FORMAT = 2
"""Version of the layout. A reader refuses other versions."""

_STEP = re.compile(r"step-(\d+)(\.pt)?")


class Checkpoints:
    """The checkpoints of one run: the last `keep` as `step-N.pt`, and `best.pt`; directories if sharded.

    Args:
        folder: Directory of the checkpoints.
        keep: Number of latest checkpoints to keep. The best one is a hard link, which also outlives its original.
        sharded: Whether every process writes its own file.
        world: The processes of the run.
    """

    def __init__(self, folder: Path, keep: int, sharded: bool = False, world: World | None = None):
        self.folder, self.keep, self.world = folder, keep, world or World()
        self.suffix = "" if sharded else ".pt"

    @property
    def best(self) -> Path:
        """The best checkpoint; the newer one if the run has switched between whole and sharded checkpoints."""
        there = [path for path in (self.folder / "best.pt", self.folder / "best") if path.exists()]
        return max(there, key=lambda path: path.stat().st_mtime_ns, default=self.folder / f"best{self.suffix}")

    def all(self) -> list[Path]:
        """The latest checkpoints, oldest first.

        Raises:
            CheckpointError: If the directory exists but cannot be listed, so it may contain a run.
        """
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            problem = f"the directory cannot be listed ({error.strerror})"
            raise CheckpointError(self.folder, problem, "Check its permissions", code="unreadable-file") from error
        return sorted((self.folder / name for name in names if _STEP.fullmatch(name)), key=step_of)

    def remove_leftovers(self, exclusive: bool = False) -> None:
        """Delete incomplete files of killed runs; `exclusive` is as in `revnets.utils.atomic_files`."""
        remove_leftovers(self.folder, exclusive=exclusive)

    def save(self, state: Mapping[str, Any], best: bool = False) -> Path:
        """Write a checkpoint, then delete those beyond `keep`. All processes must call it.

        Args:
            state: With the keys `vision.checkpoints.layout.KEYS`. `state["progress"]["step"]` is part of the name.
            best: Whether it becomes the best checkpoint.

        Returns:
            The path of the checkpoint.

        Raises:
            CheckpointError: If the checkpoint could not be written. Earlier ones are unchanged.
        """
        path = self.folder / f"step-{state['progress']['step']:07d}{self.suffix}"
        if self.suffix:
            whole = self._gathered(state)
            self.world.by_main(lambda: self._guarded(path, lambda: save_file(path, whole)))
        else:
            self._save_shards(path, state)
        self.world.by_main(lambda: self._guarded(path, lambda: self._tidy(path, best)))
        return path

    def _gathered(self, state: Mapping[str, Any]) -> dict[str, Any]:
        if self.world.size == 1:
            return _plain(state)
        from vision.checkpoints.sharding import gathered  # imports DTensor

        return gathered(state, keep=self.world.is_main)

    def _save_shards(self, path: Path, state: Mapping[str, Any]) -> None:
        """Write the shards of all processes into a directory, which is renamed when all are complete."""
        from vision.checkpoints.sharding import SAVE, STATE, divided, new_save_id, shard_name

        world = self.world
        filling, save = world.by_main(lambda: (temporary_path(path.with_name(f"{path.name}.shards")), new_save_id()))
        rest, parts = divided(state)

        def begin() -> None:
            make_folder(self.folder)
            shutil.rmtree(filling, ignore_errors=True)
            filling.mkdir()

        def write() -> None:
            save_file(filling / shard_name(world.rank, world.size), {**parts, SAVE: (save, world.rank)})
            if world.is_main:
                save_file(filling / STATE, {**rest, "shards": world.size, SAVE: save})

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
            kept = f"{before[-1]} is intact" if before else "there is no earlier checkpoint"
            problem = f"it cannot be written ({why_not_written(error)}); {kept}"
            raise CheckpointError(
                path, problem, "Free some space, then resume with resume=auto", code="unwritable-file"
            ) from error

    def _tidy(self, path: Path, best: bool) -> None:
        remove_leftovers(self.folder)
        if best:
            self.name_best(path)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)

    def name_best(self, path: Path) -> None:
        """Make a checkpoint the best one, `best.pt` or the directory `best`."""
        make_folder(self.folder)
        if path.is_dir():
            with replacing_folder(self.folder / "best") as folder:
                for file in path.iterdir():
                    link(file, folder / file.name)
        else:
            link(path, self.folder / "best.pt")


def save_file(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file atomically.

    Raises:
        OSError, RuntimeError: the file cannot be written, for example for lack of space.
    """
    with replacing(path) as file:
        torch.save(dict(content), file)


def _plain(tree: Any) -> Any:
    """Copy nested mappings, lists and tuples to plain ones, so that a file names no other classes."""
    if isinstance(tree, Mapping):
        return {key: _plain(item) for key, item in tree.items()}
    return type(tree)(map(_plain, tree)) if isinstance(tree, (list, tuple)) else tree


def step_of(path: Path) -> int:
    """The number of updates in the name of a checkpoint; -1 if there is none."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else -1


def sample_counts(data: object) -> dict[str, int]:
    """Numbers of samples in the training and validation set, if they are known, which a checkpoint records."""
    found = {}
    for part in ("train", "val"):
        with suppress(TypeError, AttributeError):
            found[part] = len(getattr(data, part))
    return found


def versions() -> dict[str, str]:
    """Versions of the packages that a checkpoint is written with."""
    import platform

    import numpy
    import timm

    import revnets

    return {
        "revnets": revnets.__version__,
        "torch": str(torch.__version__),  # a subclass of str, which a safe load refuses
        "timm": timm.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }
