"""The shards that have no label file yet, claimed one by one by any number of processes.

A claim is a lock on a file beside the labels, which ends with its process, however that ends: then another process
takes the shard. On one machine, and on network file systems with locks (NFS, Lustre with `flock`, CephFS, GPFS), each
shard is labeled once. Elsewhere two machines may label one shard at the same time; since both write the same bytes, and
a file takes its name when it is complete, that costs time alone.
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
"""Seconds between looks at shards that other processes have claimed."""


class WorkQueue:
    """The shards of a set of labels.

    Args:
        folder: of the label files.
        shards: all of the set.
        provenance: of the labels.

    Raises:
        revnets.SpecError: the folder holds label files of another teacher, of other data or settings, or damaged ones.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...], provenance: Provenance):
        self.folder, self.shards, self.provenance = folder, shards, provenance
        self._waiting = {part_path(folder, shard.number).name: shard for shard in shards}
        for file in read_parts(folder):
            self._finish(file)
            file.require_intact()  # later files are new, and written by processes of the same command

    def waiting(self) -> list[Shard]:
        """The shards without a label file; the folder is listed once."""
        for name in self._waiting.keys() & os.listdir(self.folder):
            self._finish(read_part(self.folder / name))
        return list(self._waiting.values())

    def images_waiting(self) -> int:
        """Images of these shards."""
        return sum(len(shard.images) for shard in self.waiting())

    def claims(self, rank: int = 0, size: int = 1, wait: Callable[[str], None] = lambda _: None) -> Iterator[Shard]:
        """Shards that this process is to label, until all have a label file. A claim lasts until the next is taken.

        Args:
            rank, size: this process among those that begin together; each begins at another shard.
            wait: gets the owner of a claim while nothing is left but what others have claimed.
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
        for path in self.folder.glob(".part-*.lock"):  # of processes that were killed between writing and releasing
            with suppress(LockedError), FileLock(path):
                pass

    def _is_done(self, shard: Shard) -> bool:
        path = part_path(self.folder, shard.number)
        if path.name in self._waiting and path.exists():
            self._finish(read_part(path))
        return path.name not in self._waiting

    def _finish(self, file: LabelFile) -> None:
        if difference := self.provenance.difference(file.provenance):
            problem = f"{file.path} has other labels: {difference}"
            raise option_error("--output", problem, "Give a new folder", code="settings-differ")
        self._waiting.pop(file.path.name, None)
