"""Label files: predictions of a teacher for the images of a data set, one Parquet file per part of the set.

The files `FOLDER/part-00000.parquet` and so on have one row per readable image, sorted by `key`, the path of the image.
Each head NAME has the columns `NAME.classes` and `NAME.probabilities` with the probabilities above a minimum, and
`NAME.rest` with the remaining probability. The metadata `revnets.labels` describe what a file was made from. Files are
untrusted: metadata, columns and every row are checked, and nothing in them is executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from revnets.config.errors import ConfigError, show
from revnets.utils.atomic_files import replacing
from vision.data.key_lists import MAX_KEY, key_texts, open_parquet
from vision.pseudo_labels.row_digest import RowDigest
from vision.pseudo_labels.sparse import SparseProbabilities

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = b"revnets.labels"
MAX_PARTS, MAX_CLASSES, MAX_HEADS = 10**6, 10**6, 1000


@dataclass(frozen=True, slots=True)
class Provenance:
    """What label files were made from. Label files with the same provenance are bit-identical.

    Attributes:
        teacher: sha256 of its weights.
        data: sha256 of the list of images.
        settings: Everything else that a prediction depends on.
        heads: Number of classes by the name of the head.
        parts: Number of files in the set.
        round: Round of pseudo-labeling, from 1. The student of a round is the teacher of the next.
    """

    teacher: str
    data: str
    settings: dict[str, Any]
    heads: dict[str, int]
    parts: int
    round: int = 1

    def difference(self, other: Provenance) -> str:
        """Describe the first attribute that differs in `other`; empty if none does."""
        for name, ours, theirs in zip(asdict(self), asdict(self).values(), asdict(other).values(), strict=True):
            if ours != theirs:
                if isinstance(ours, dict):
                    name, ours, theirs = _first_item(name, ours, theirs)
                short = (str(value)[:12] if name in ("teacher", "data") else show(value) for value in (theirs, ours))
                return "{} is {}, not {}".format(name, *short)
        return ""


def _first_item(name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any]:
    key = next((key for key in (*ours, *theirs) if ours.get(key) != theirs.get(key)), None)
    return (name, [*ours], [*theirs]) if key is None else (f"{name}.{key}", ours.get(key), theirs.get(key))


@dataclass(frozen=True, slots=True)
class LabelBatch:
    """Some rows of a file: keys, and probabilities by the names of the heads."""

    keys: list[str]
    heads: dict[str, SparseProbabilities]


@dataclass(frozen=True, slots=True)
class LabelFile:
    """A file whose metadata and columns have been checked. `batches` checks the rows.

    Attributes:
        path: Of the file.
        provenance: Of the labels.
        part: Index of the file in the set.
        rows: Number of images.
        unreadable: Keys of images that could not be read and have no row.
        digest: sha256 of metadata and rows; None in files of earlier versions.
    """

    path: Path
    provenance: Provenance
    part: int
    rows: int
    unreadable: tuple[str, ...]
    digest: str | None = None

    def batches(self, rows: int = 4096) -> Iterator[LabelBatch]:
        """Yield the rows in order.

        Args:
            rows: Most rows of a batch.

        Raises:
            revnets.SpecError: If a row is not a valid prediction, the keys are not sorted, a key is also among the
                unreadable images, or, after the last row, the digest does not match.
        """
        last, seen, unreadable = "", 0, set(self.unreadable)
        digest = _digest(self.provenance, self.part, self.unreadable)
        with open_parquet(self.path, dictionaries=["key"]) as file:
            for table in file.iter_batches(rows):
                batch = self._batch(table, seen)
                for key in batch.keys:
                    if key <= last:
                        raise _damaged(self.path, f"row {seen} has the key {show(key)} after {show(last)}")
                    if key in unreadable:
                        raise _damaged(self.path, f"row {seen} has the key of an unreadable image, {show(key)}")
                    last, seen = key, seen + 1
                digest.update(batch.keys, batch.heads)
                yield batch
        if seen != self.rows:
            raise _damaged(self.path, f"it has {seen} rows instead of {self.rows}")
        if self.digest not in (None, digest.hexdigest()):
            raise _damaged(self.path, "its rows do not match the digest in its metadata")

    def require_intact(self) -> None:
        """Read and check all rows.

        Raises:
            revnets.SpecError: As for `batches`.
        """
        for _ in self.batches(2**16):
            pass

    def _batch(self, table: pa.RecordBatch, seen: int) -> LabelBatch:
        if any(column.null_count for column in table.columns):
            raise _damaged(self.path, f"a row from number {seen} on has a missing value")
        heads = {}
        for name, count in self.provenance.heads.items():
            lists = [table.column(f"{name}.{part}") for part in ("classes", "probabilities")]
            offsets = [np.asarray(column.offsets, np.int64) for column in lists]
            starts, values = [offset - offset[0] for offset in offsets], [column.flatten() for column in lists]
            rest = np.asarray(table.column(f"{name}.rest"))
            if not np.array_equal(*starts) or any(value.null_count for value in values):
                raise _damaged(self.path, f"a row from number {seen} on has classes without probabilities of {name}")
            heads[name] = SparseProbabilities(starts[0], np.asarray(values[0]), np.asarray(values[1]), rest)
            if flaw := heads[name].flaw(count, seen):
                raise _damaged(self.path, f"{flaw} of {name}")
        return LabelBatch(key_texts(table.column("key")), heads)


@dataclass(frozen=True)
class LabelFolder:
    """All files of a set of labels in order."""

    path: Path
    files: tuple[LabelFile, ...]

    @property
    def provenance(self) -> Provenance:
        return self.files[0].provenance

    @property
    def heads(self) -> dict[str, int]:
        """Number of classes by the name of the head."""
        return self.provenance.heads

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @cached_property
    def unreadable(self) -> frozenset[str]:
        """Keys of images that the teacher could not read."""
        return frozenset(key for file in self.files for key in file.unreadable)

    def batches(self, rows: int = 4096) -> Iterator[LabelBatch]:
        """Yield all rows, sorted by key.

        Args:
            rows: Most rows of a batch.

        Raises:
            revnets.SpecError: If a row is not a valid prediction, or two files have the same key.
        """
        last: tuple[str, Path] | None = None
        for file in self.files:
            for batch in file.batches(rows):
                if last is not None and batch.keys[:1] <= [last[0]] and batch.keys:
                    problem = f"its keys from {show(batch.keys[0])} on overlap with {last[1].name}"
                    raise ConfigError(str(file.path), "", problem, "Label the data set again", code="name-clash")
                yield batch
                last = (batch.keys[-1], file.path) if batch.keys else last


def part_path(folder: Path, part: int) -> Path:
    """The path of the file of a part."""
    return folder / f"part-{part:05d}.parquet"


def write_part(
    path: Path,
    provenance: Provenance,
    part: int,
    keys: Sequence[str],
    heads: Mapping[str, SparseProbabilities],
    unreadable: Sequence[str] = (),
) -> None:
    """Write a label file atomically. Equal arguments give equal bytes.

    Args:
        path: Of the file.
        provenance: Of the labels.
        part: Index of the file in the set.
        keys: Of the images, sorted.
        heads: Probabilities by the names of the heads.
        unreadable: Keys of the images that have no row.

    Raises:
        OSError: If the file cannot be written, for lack of space or permission. Its `filename` is the path.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: list[Any] = [pa.array(keys, pa.string())]
    for name in provenance.heads:
        sparse = heads[name]
        offsets = pa.array(sparse.offsets, pa.int32())
        values = pa.array(sparse.classes, pa.int32()), pa.array(sparse.probabilities, pa.float16())
        columns += [pa.ListArray.from_arrays(offsets, value) for value in values]
        columns.append(pa.array(sparse.rest, pa.float16()))
    digest = _digest(provenance, part, unreadable)
    digest.update(keys, heads)
    content = {**asdict(provenance), "part": part, "unreadable": list(unreadable), "digest": digest.hexdigest()}
    metadata = {METADATA: json.dumps(content).encode()}
    table = pa.table(columns, schema=_schema(provenance.heads).with_metadata(metadata))
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=False, write_page_checksum=True)
    with replacing(path) as file:
        file.write(buffer.getvalue())


def read_labels(folder: Path | str) -> LabelFolder:
    """Open a complete set of label files.

    Raises:
        revnets.SpecError: If there are no files, a part is missing, damaged or duplicated, or parts are of different
            sets.
    """
    folder = Path(folder)
    files = read_parts(folder)
    if not files:
        hint = "Create them: revnets label TEACHER DATA -o FOLDER"
        raise ConfigError(str(folder), "", "the directory has no label files", hint, code="missing-file")
    count = files[0].provenance.parts
    if len(files) < count:
        missing = min(set(range(count)) - {file.part for file in files})
        problem = f"only {len(files)} of {count} parts exist; {part_path(folder, missing).name} is missing"
        raise ConfigError(str(folder), "", problem, "Run revnets label again to resume it", code="missing-file")
    return LabelFolder(folder, tuple(files))


def read_parts(folder: Path) -> list[LabelFile]:
    """Open the label files in a directory, which need not be complete.

    Raises:
        revnets.SpecError: If a file is damaged or duplicated, or two files are of different sets.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".parquet") and not name.startswith("."))
    except NotADirectoryError:
        raise ConfigError(
            str(folder), "", "not a directory", "Give the directory of the labels", code="not-a-folder"
        ) from None
    except FileNotFoundError:
        problem = "there is no such directory"
        raise ConfigError(str(folder), "", problem, "Check the path", code="missing-file") from None
    files = [read_part(folder / name) for name in names]
    for file in files:
        if difference := files[0].provenance.difference(file.provenance):
            problem = f"{difference} as in {files[0].path.name}"
            hint = "Use one directory for each teacher and data set"
            raise ConfigError(str(file.path), "", problem, hint, code="settings-differ")
    return sorted(files, key=lambda file: file.part)


def read_part(path: Path) -> LabelFile:
    """Open a label file and check its metadata and columns.

    Raises:
        revnets.SpecError: If it is not a label file, or has the name of another part.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
        provenance, part, unreadable, digest = _checked(
            path, json.loads((schema.metadata or {}).get(METADATA, b"null"))
        )
        if not schema.equals(_schema(provenance.heads)):
            raise _damaged(path, "its columns do not match its heads")
        if path != part_path(path.parent, part):
            problem = f"it is a copy of {part_path(path.parent, part).name} under another name"
            raise ConfigError(str(path), "", problem, "Remove or rename the file", code="name-clash")
        return LabelFile(path, provenance, part, file.metadata.num_rows, unreadable, digest)


def _schema(heads: Mapping[str, int]) -> pa.Schema:
    import pyarrow as pa

    fields = [pa.field("key", pa.string())]
    for name in heads:
        fields.append(pa.field(f"{name}.classes", pa.list_(pa.int32())))
        fields.append(pa.field(f"{name}.probabilities", pa.list_(pa.float16())))
        fields.append(pa.field(f"{name}.rest", pa.float16()))
    return pa.schema(fields)


def _checked(path: Path, content: Any) -> tuple[Provenance, int, tuple[str, ...], str | None]:
    """Provenance, part, unreadable images and digest from the metadata of a file."""
    kinds = {"teacher": str, "data": str, "settings": dict, "heads": dict, "parts": int, "round": int, "part": int}
    if not isinstance(content, dict):
        raise ConfigError(str(path), "", "not a label file", "Give the directory of label files", code="wrong-format")
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            raise _damaged(path, f"its metadata has no {key}")
    heads, unreadable = content["heads"], content.get("unreadable", [])
    is_list = isinstance(unreadable, list) and all(isinstance(key, str) and len(key) <= MAX_KEY for key in unreadable)
    are_heads = all(type(count) is int and 1 < count <= MAX_CLASSES for count in heads.values())
    if not (is_list and are_heads and 0 < len(heads) <= MAX_HEADS):
        raise _damaged(path, "its metadata has no valid heads or unreadable images")
    if not 0 <= content["part"] < content["parts"] <= MAX_PARTS or content["round"] < 1:
        raise _damaged(path, f"its metadata has the part {content['part']} of {content['parts']}")
    digest = content.get("digest")
    if not isinstance(digest, str | None):
        raise _damaged(path, "its digest is not text")
    values = (content[key] for key in ("teacher", "data", "settings", "heads", "parts", "round"))
    return Provenance(*values), content["part"], tuple(unreadable), digest


def _digest(provenance: Provenance, part: int, unreadable: Sequence[str]) -> RowDigest:
    """The digest of a file before its first row."""
    content = {**asdict(provenance), "part": part, "unreadable": list(unreadable)}
    return RowDigest(content, provenance.heads)


def _damaged(path: Path, problem: str, remedy: str = "Remove the file and run revnets label again") -> ConfigError:
    return ConfigError(str(path), "", problem, remedy, code="damaged-file")
