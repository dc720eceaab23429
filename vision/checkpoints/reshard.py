"""The command `revnets reshard`: converts a checkpoint in one file to shards, and back."""

from __future__ import annotations

from pathlib import Path

from revnets.utils.atomic_files import replacing_folder
from vision.checkpoints.manager import save_file
from vision.checkpoints.new_file import new_file
from vision.checkpoints.reader import read
from vision.checkpoints.sharding import SAVE, STATE, new_save_id, shard_name, split


def reshard(source: Path, target: Path, count: int) -> None:
    """Rewrite a checkpoint with another number of shards. The source is not changed.

    Args:
        source: A checkpoint, in one file or in shards.
        target: A new file, or with `count` a new directory.
        count: Number of shards, one for each process that will train; 0 for one file.

    Raises:
        CheckpointError: If the source cannot be read, or the target exists or cannot be written.
    """
    state = read(source)
    with new_file(target, f"; {source} is unchanged"):
        if not count:
            save_file(target, state)
            return
        rest, parts = split(state, count)
        save = new_save_id()
        with replacing_folder(target) as folder:
            for rank, part in enumerate(parts):
                save_file(folder / shard_name(rank, count), {**part, SAVE: (save, rank)})
            save_file(folder / STATE, {**rest, "shards": count, SAVE: save})
