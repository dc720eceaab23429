"""Label files: what a teacher predicts for the images of a data set, as Parquet, a file for each part of the set.

`FOLDER/part-00000.parquet` and so on have a row for each image that could be read, sorted by `key`, the path of the
image. For each head NAME there are the columns `NAME.classes` and `NAME.probabilities`, those above a minimum, and
`NAME.rest`, the probability that is left. The metadata `revnets.labels` of a file say what it was made from. A file is
data of others: its metadata, its columns and every row are checked, and nothing in it is executed.
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
    """What label files were made from. Two sets of them with the same provenance are the same, bit for bit.

    Attributes:
        teacher: sha256 of its weights.
        data: sha256 of the list of images.
        settings: all else that a prediction depends on.
        heads: number of classes by the name of the head.
        parts: files of the set.
        round: of pseudo-labeling, from 1 on: the student of one is the teacher of the next.
    """

    teacher: str
    data: str
    settings: dict[str, Any]
    heads: dict[str, int]
    parts: int
    round: int = 1

    def difference(self, other: Provenance) -> str:
        """The first attribute in which another one differs, and how; empty if none does."""
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
    """Some rows of a file: keys and, by the names of the heads, probabilities."""

    keys: list[str]
    heads: dict[str, SparseProbabilities]


@dataclass(frozen=True, slots=True)
class LabelFile:
    """A file whose metadata and columns have been checked; `batches` checks the rows.

    Attributes:
        part: its number among those of the set, from 0 on.
        rows: images.
        unreadable: keys of images that could not be read and have no row.
        digest: sha256 of metadata and rows; None in files of earlier versions.
    """

    path: Path
    provenance: Provenance
    part: int
    rows: int
    unreadable: tuple[str, ...]
    digest: str | None = None

    def batches(self, rows: int = 4096) -> Iterator[LabelBatch]:
        """The rows in order, at most that many at a time.

        Raises:
            revnets.SpecError: a row is no prediction, keys are not sorted, one is also among the unreadable images,
                or, after the last row, the digest does not match.
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
                        raise _damaged(self.path, f"row {seen} has the key {show(key)} of an unreadable image")
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
            revnets.SpecError: as for `batches`.
        """
        for _ in self.batches(2**16):
            pass

    def _batch(self, table: pa.RecordBatch, seen: int) -> LabelBatch:
        if any(column.null_count for column in table.columns):
            raise _damaged(self.path, f"a value is missing in a row from {seen} on")
        heads = {}
        for name, count in self.provenance.heads.items():
            lists = [table.column(f"{name}.{part}") for part in ("classes", "probabilities")]
            offsets = [np.asarray(column.offsets, np.int64) for column in lists]
            starts, values = [offset - offset[0] for offset in offsets], [column.flatten() for column in lists]
            rest = np.asarray(table.column(f"{name}.rest"))
            if not np.array_equal(*starts) or any(value.null_count for value in values):
                raise _damaged(self.path, f"rows from {seen} on have classes without probabilities of {name}")
            heads[name] = SparseProbabilities(starts[0], np.asarray(values[0]), np.asarray(values[1]), rest)
            if flaw := heads[name].flaw(count, seen):
                raise _damaged(self.path, f"{flaw} of {name}")
        return LabelBatch(key_texts(table.column("key")), heads)


@dataclass(frozen=True)
class LabelFolder:
    """All files of a set of labels, in order."""

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
        """All rows, sorted by key, at most that many at a time.

        Raises:
            revnets.SpecError: a row is no prediction, or a key is there twice.
        """
        last: tuple[str, Path] | None = None
        for file in self.files:
            for batch in file.batches(rows):
                if last is not None and batch.keys[:1] <= [last[0]] and batch.keys:
                    problem = f"the images from {show(batch.keys[0])} on are also in {last[1].name}"
                    raise ConfigError(str(file.path), "", problem, "Label the data set again", code="name-clash")
                yield batch
                last = (batch.keys[-1], file.path) if batch.keys else last


def part_path(folder: Path, part: int) -> Path:
    """The file of a part."""
    return folder / f"part-{part:05d}.parquet"


def write_part(
    path: Path,
    provenance: Provenance,
    part: int,
    keys: Sequence[str],
    heads: Mapping[str, SparseProbabilities],
    unreadable: Sequence[str] = (),
) -> None:
    """Write a file of labels; it takes its name once it is on the disk. Equal arguments give equal bytes.

    Args:
        keys: of the images, sorted.
        heads: their probabilities, by the names of the heads.
        unreadable: keys of the images that have no row.

    Raises:
        OSError: no space, no permission and the like; its `filename` is the path.
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
    """A complete set of label files.

    Raises:
        revnets.SpecError: there are none, a part is missing, damaged or there twice, or parts are of different sets.
    """
    folder = Path(folder)
    files = read_parts(folder)
    if not files:
        remedy = "Make them: revnets label TEACHER DATA -o FOLDER"
        raise ConfigError(str(folder), "", "there are no label files here", remedy, code="missing-file")
    count = files[0].provenance.parts
    if len(files) < count:
        missing = min(set(range(count)) - {file.part for file in files})
        problem = f"{len(files)} of {count} parts are here; {part_path(folder, missing).name} is missing"
        raise ConfigError(str(folder), "", problem, "Run revnets label again, which goes on", code="missing-file")
    return LabelFolder(folder, tuple(files))


def read_parts(folder: Path) -> list[LabelFile]:
    """The label files that are in a folder, perhaps not yet all of their set.

    Raises:
        revnets.SpecError: one is damaged or there twice, or two are of different sets.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(".parquet") and not name.startswith("."))
    except NotADirectoryError:
        raise ConfigError(
            str(folder), "", "this is no folder", "Give that of the labels", code="not-a-folder"
        ) from None
    except FileNotFoundError:
        raise ConfigError(str(folder), "", "there is no such folder", "Check the path", code="missing-file") from None
    files = [read_part(folder / name) for name in names]
    for file in files:
        if difference := files[0].provenance.difference(file.provenance):
            problem = f"{difference} as in {files[0].path.name}"
            raise ConfigError(
                str(file.path), "", problem, "Keep the labels of one teacher and data set", code="settings-differ"
            )
    return sorted(files, key=lambda file: file.part)


def read_part(path: Path) -> LabelFile:
    """A label file, whose metadata and columns are checked.

    Raises:
        revnets.SpecError: it is none, or has the name of another part.
    """
    with open_parquet(path) as file:
        schema = file.schema_arrow
        provenance, part, unreadable, digest = _checked(
            path, json.loads((schema.metadata or {}).get(METADATA, b"null"))
        )
        if not schema.equals(_schema(provenance.heads)):
            raise _damaged(path, "its columns are not those of its heads")
        if path != part_path(path.parent, part):
            problem = f"it is a copy of {part_path(path.parent, part).name} under another name"
            raise ConfigError(str(path), "", problem, "Remove or rename it", code="name-clash")
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
        raise ConfigError(str(path), "", "it is no file of labels", "Give the folder of some", code="wrong-format")
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            raise _damaged(path, f"its metadata have no {key}")
    heads, unreadable = content["heads"], content.get("unreadable", [])
    is_list = isinstance(unreadable, list) and all(isinstance(key, str) and len(key) <= MAX_KEY for key in unreadable)
    are_heads = all(type(count) is int and 1 < count <= MAX_CLASSES for count in heads.values())
    if not (is_list and are_heads and 0 < len(heads) <= MAX_HEADS):
        raise _damaged(path, "its metadata have no heads with numbers of classes")
    if not 0 <= content["part"] < content["parts"] <= MAX_PARTS or content["round"] < 1:
        raise _damaged(path, f"it is part {content['part']} of {content['parts']}")
    digest = content.get("digest")
    if not isinstance(digest, str | None):
        raise _damaged(path, "its digest is not text")
    values = (content[key] for key in ("teacher", "data", "settings", "heads", "parts", "round"))
    return Provenance(*values), content["part"], tuple(unreadable), digest


def _digest(provenance: Provenance, part: int, unreadable: Sequence[str]) -> RowDigest:
    """The digest of a file before its first row."""
    content = {**asdict(provenance), "part": part, "unreadable": list(unreadable)}
    return RowDigest(content, provenance.heads)


def _damaged(path: Path, problem: str, remedy: str = "Remove it and run revnets label again") -> ConfigError:
    return ConfigError(str(path), "", problem, remedy, code="damaged-file")
