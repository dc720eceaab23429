"""Labels by key for images that are read sequentially. The label file of a shard is read with its first image."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property

from revnets.config.errors import ConfigError
from vision.errors import DataError
from vision.pseudo_labels.label_files import LabelFolder
from vision.pseudo_labels.sparse import SparseProbabilities, joined_rows

KEPT = 8
"""Number of files whose labels are in memory. A shuffling buffer rarely mixes images of more shards."""

Rows = tuple[dict[str, int], dict[str, SparseProbabilities]]
"""Row by key, and labels by head."""


def sample_key(key: str) -> str:
    """The key of an image in a tar without its suffixes, as in webdataset: `a.tar/x/1.seg.png` becomes `a.tar/x/1`."""
    archive, slash, member = key.partition("/")
    return archive + slash + re.sub(r"^((?:.*/|)[^.]+)[.][^/]*$", r"\1", member)


class LabelLookup:
    """Labels of samples in tars.

    Args:
        folder: The labels, one file per tar.
        shared: Heads whose labels are returned.
    """

    def __init__(self, folder: LabelFolder, shared: Sequence[str]):
        self.folder, self.shared = folder, list(shared)
        self.kept: OrderedDict[str, Rows] = OrderedDict()

    @cached_property
    def unreadable(self) -> frozenset[str]:
        """Samples that the teacher could not read."""
        return frozenset(map(sample_key, self.folder.unreadable))

    @cached_property
    def files(self) -> dict[str, int]:
        """Index of the label file by the name of the tar."""
        found = {}
        for number, file in enumerate(self.folder.files):
            first = next((key for batch in file.batches(1) for key in batch.keys), "")
            found[first.partition("/")[0]] = number
        return found

    @cached_property
    def archives(self) -> frozenset[str]:
        """Names of the tars that have labels."""
        return frozenset(key.partition("/")[0] for key in (*self.files, *self.unreadable)) - {""}

    def __call__(self, key: str) -> tuple[Mapping[str, SparseProbabilities], int]:
        """Labels by head, and the row of a sample in them; -1 if the teacher could not read it.

        Args:
            key: Of `sample_key`.

        Raises:
            vision.errors.DataError: If there is no label, or the label file is damaged.
        """
        try:
            rows, labels = self._rows(key.partition("/")[0])
        except ConfigError as error:  # a loader's worker cannot pass it to the main process
            raise DataError(str(error)) from None
        row = rows.get(key, -1)
        if row < 0 and key not in self.unreadable:
            raise DataError(f"{self.folder.path}: no label of {key}. Label these tars: revnets label")
        return labels, row

    def _rows(self, archive: str) -> Rows:
        if archive not in self.kept:
            if len(self.kept) == KEPT:
                self.kept.popitem(last=False)
            number = self.files.get(archive)
            batches = [] if number is None else list(self.folder.files[number].batches(2**16))
            keys = [sample_key(key) for batch in batches for key in batch.keys]
            labels = {name: joined_rows([batch.heads[name] for batch in batches]) for name in self.shared}
            rows = {key: row for row, key in enumerate(keys)}
            if number is not None and len(rows) < len(keys):
                twice = next(key for row, key in enumerate(keys) if rows[key] != row)
                problem, path = f"the sample {twice} has two labeled images", str(self.folder.files[number].path)
                hint = "Label one image per sample: revnets label --input-key"
                raise ConfigError(path, "", problem, hint, code="name-clash")
            self.kept[archive] = rows, labels
        self.kept.move_to_end(archive)
        return self.kept[archive]
