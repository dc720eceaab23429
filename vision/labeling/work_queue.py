"""The shards that have no label file yet, claimed one by one by any number of processes.

A claim is a lock on a file in the directory of the labels. It ends with its process, also if that is killed, and then
another process claims the shard. On one machine, and on network file systems with locks (NFS, Lustre with `flock`,
CephFS, GPFS), each shard is labeled once. On others two machines may label the same shard at the same time. This only
costs time: both write the same bytes, and files are written atomically.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from revnets.config.errors import option_error
from revnets.utils.file_lock import FileLock, LockedError
from vision.labeling.shards import Shard
from vision.pseudo_labels.label_files import LabelFile, Provenance, part_path, read_part, read_parts

PAUSE = 1.0
"""Seconds between checks of shards that other processes have claimed."""


class WorkQueue:
    """The shards of a set of labels.

    Args:
        folder: Directory of the label files.
        shards: All shards of the set.
        provenance: Of the labels.

    Raises:
        revnets.SpecError: If the directory has label files of another teacher, data set or settings, or damaged ones.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...], provenance: Provenance):
        self.folder, self.shards, self.provenance = folder, shards, provenance
        self._waiting = {part_path(folder, shard.number).name: shard for shard in shards}
        for file in read_parts(folder):
            self._finish(file)
            file.require_intact()  # files that appear later are new

    def waiting(self) -> list[Shard]:
        """The shards without a label file. The directory is listed once."""
        for name in self._waiting.keys() & os.listdir(self.folder):
            self._finish(read_part(self.folder / name))
        return list(self._waiting.values())

    def images_waiting(self) -> int:
        """Number of images in the shards without a label file."""
        return sum(len(shard.images) for shard in self.waiting())

    def claims(self, rank: int = 0, size: int = 1, wait: Callable[[str], None] = lambda _: None) -> Iterator[Shard]:
        """Yield shards for this process to label, until all have a label file. A claim lasts until the next one.

        Args:
            rank, size: of the processes that start together. Each starts at another shard.
            wait: Called with the owner of a claim while all remaining shards are claimed by other processes.
        """
        while waiting := self.waiting():
            start, has_claimed, locked = rank * len(waiting) // size, False, None
            for shard in (*waiting[start:], *waiting[:start]):
                if self._is_done(shard):
                    continue
                lock = FileLock(self.folder / f".{part_path(self.folder, shard.number).stem}.lock")
                try:
                    lock.acquire()
                except LockedError as error:
                    locked = error
                    continue
                with lock:
                    if not self._is_done(shard):
                        has_claimed = True
                        yield shard
            if not has_claimed and locked is not None:
                wait(str(locked.owner or "another process"))
                time.sleep(PAUSE)
        for path in self.folder.glob(".part-*.lock"):  # left by processes that were killed
            with suppress(LockedError), FileLock(path):
                pass

    def _is_done(self, shard: Shard) -> bool:
        path = part_path(self.folder, shard.number)
        if path.name in self._waiting and path.exists():
            self._finish(read_part(path))
        return path.name not in self._waiting

    def _finish(self, file: LabelFile) -> None:
        if difference := self.provenance.difference(file.provenance):
            problem = f"{file.path} was made otherwise: {difference}"
            raise option_error("--output", problem, "Give a new directory", code="settings-differ")
        self._waiting.pop(file.path.name, None)
