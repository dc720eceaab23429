"""Digest of the rows of a label file, which is stored in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from vision.pseudo_labels.sparse import SparseProbabilities


class RowDigest:
    """The sha256 of the metadata and the rows of a label file, updated batch by batch.

    Each column has its own hash, so the result does not depend on the sizes of the batches.

    Args:
        metadata: Of the file, as plain data.
        heads: Names of the heads, in the order of the columns.
    """

    def __init__(self, metadata: Mapping[str, Any], heads: Iterable[str]):
        self._metadata = json.dumps(metadata, sort_keys=True).encode()
        self._keys = sha256()
        self._columns = {name: [sha256() for _ in range(4)] for name in heads}

    def update(self, keys: Sequence[str], heads: Mapping[str, SparseProbabilities]) -> None:
        """Add rows."""
        self._keys.update("".join(f"{key}\0" for key in keys).encode("utf-8", "surrogateescape"))
        for name, columns in self._columns.items():
            sparse = heads[name]
            values = (np.diff(sparse.offsets), "<i8"), (sparse.classes, "<i4"), (sparse.probabilities, "<f2")
            for column, (array, kind) in zip(columns, (*values, (sparse.rest, "<f2")), strict=True):
                column.update(array.astype(kind).tobytes())

    def hexdigest(self) -> str:
        """The digest of all rows added so far."""
        columns = [self._keys, *(column for columns in self._columns.values() for column in columns)]
        return sha256(self._metadata + b"".join(column.digest() for column in columns)).hexdigest()
