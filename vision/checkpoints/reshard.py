"""`revnets reshard`: a checkpoint in one file as a folder of shards, and back."""

from __future__ import annotations

from pathlib import Path

from revnets.utils.atomic_files import replacing_folder
from vision.checkpoints.manager import read, save_file
from vision.checkpoints.sharding import STATE, shard_name, split
from vision.errors import CheckpointError, first_line


def reshard(source: Path, target: Path, count: int) -> None:
    """Write a checkpoint anew.

    Args:
        source: a checkpoint, in one file or in shards.
        target: a new file, or with `count` a new folder.
        count: how many shards, one for each process that will train; 0 for one whole file.

    Raises:
        CheckpointError: the source cannot be read, or the target exists or cannot be written. The source is untouched.
    """
    state = read(source)
    if target.exists():
        raise CheckpointError(target, "exists already", "Give a new path", code="file-exists")
    try:
        if not count:
            save_file(target, state)
            return
        rest, parts = split(state, count)
        with replacing_folder(target) as folder:
            for rank, part in enumerate(parts):
                save_file(folder / shard_name(rank, count), part)
            save_file(folder / STATE, {**rest, "shards": count})
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        problem = f"cannot be written ({first_line(error)}); {source} is untouched"
        raise CheckpointError(
            target, problem, "Free some space, or give another path", code="unwritable-file"
        ) from error
