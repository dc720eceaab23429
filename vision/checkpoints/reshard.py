"""`revnets reshard`: a checkpoint in one file as a folder of shards, and back."""

from __future__ import annotations

from pathlib import Path

from revnets.utils.atomic_files import replacing_folder
from vision.checkpoints.manager import save_file
from vision.checkpoints.new_file import new_file
from vision.checkpoints.reader import read
from vision.checkpoints.sharding import SAVE, STATE, new_save_id, shard_name, split


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
    with new_file(target, f"; {source} is untouched"):
        if not count:
            save_file(target, state)
            return
        rest, parts = split(state, count)
        save = new_save_id()
        with replacing_folder(target) as folder:
            for rank, part in enumerate(parts):
                save_file(folder / shard_name(rank, count), {**part, SAVE: (save, rank)})
            save_file(folder / STATE, {**rest, "shards": count, SAVE: save})
