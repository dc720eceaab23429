"""Lists of image keys, such as those excluded from training: a text with one key per line, or a Parquet file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from revnets.config.errors import ConfigError
from revnets.utils.regular_files import open_regular
from vision.errors import first_line, printable, run_error

if TYPE_CHECKING:
    import pyarrow.parquet

MAX_BYTES = 2**30
"""Size limit of a list, more than ten million keys need."""

MAX_KEY = 2**13
"""Characters of a key, twice the limit of a path on Linux."""

EXPANSION, FREE_BYTES = 64, 2**26
"""Largest ratio of the size of the columns to the size of a Parquet file, and bytes that columns may always have."""


def read_keys(file: str) -> frozenset[str]:
    """Read a list of keys: the column `key` of a `.parquet` file, or the lines of any other file.

    Raises:
        revnets.SpecError: If the file does not exist, or is not a list of keys.
    """
    path = Path(file)
    if path.suffix.lower() == ".parquet":
        with open_parquet(path, dictionaries=["key"]) as opened:
            kinds = [str(field.type) for field in opened.schema_arrow if field.name == "key"]
            if not kinds or not kinds[0].startswith(("dictionary<values=string,", "dictionary<values=large_string,")):
                problem = f"{path} has no column `key` of strings"
                raise run_error("data.exclude", problem, "Give a list of keys", code="wrong-format")
            batches = opened.iter_batches(2**20, columns=["key"])
            return frozenset(key for batch in batches for key in key_texts(batch.column(0)))
    try:
        with open_regular(path) as opened:
            size = os.fstat(opened.fileno()).st_size
            data = opened.read(size) if size <= MAX_BYTES else None
    except OSError as error:
        problem = f"{path} cannot be read ({error.strerror or first_line(error)})"
        raise run_error("data.exclude", problem, "Check the path", code="missing-file") from None
    if data is None:
        problem = f"{path} is larger than {MAX_BYTES:,} bytes"
        raise run_error("data.exclude", problem, "Give a list of keys", code="too-large")
    try:
        keys = frozenset(key for line in data.decode("utf-8-sig").split("\n") if (key := line.removesuffix("\r")))
    except UnicodeDecodeError:
        raise run_error("data.exclude", f"{path} is not UTF-8", "Convert it", code="invalid-encoding") from None
    if (longest := max(map(len, keys), default=0)) > MAX_KEY:
        problem = f"{path} has a key of {longest} characters"
        raise run_error("data.exclude", problem, f"Give keys of at most {MAX_KEY}", code="too-large")
    return keys


def listing_digest(keys: Iterable[str]) -> str:
    """The sha256 of the keys of a data set, in any order. It identifies the images that labels are for."""
    digest = hashlib.sha256()
    for key in sorted(keys):
        digest.update(key.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()


def key_texts(column: pyarrow.DictionaryArray) -> list[str]:
    """The keys of a column that is read as a dictionary, without nulls. Equal keys are one object.

    Raises:
        ValueError: If a key is too long or not UTF-8.
    """
    numbers = column.indices.drop_null().dictionary_encode()
    keys = column.dictionary.take(numbers.dictionary).to_pylist()
    if (longest := max(map(len, keys), default=0)) > MAX_KEY:
        raise ValueError(f"a key has {longest} characters")
    return [keys[number] for number in numbers.indices.to_pylist()]


@contextmanager
def open_parquet(path: Path, dictionaries: Sequence[str] = ()) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Open a Parquet file whose declared columns are not much larger than the file.

    Args:
        dictionaries: String columns to read as dictionaries, which store a repeated string once.

    Raises:
        revnets.SpecError: If the file cannot be read, also within the `with` block, or pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        problem, remedy = "Parquet files need pyarrow, which is not installed", "pip install 'revnets[labels]'"
        raise ConfigError(str(path), "", problem, remedy, code="missing-dependency") from None
    try:
        with open_regular(path) as opened:
            metadata = pq.read_metadata(opened)
            columns = {metadata.schema.column(number).path for number in range(metadata.num_columns)}
            file = pq.ParquetFile(
                opened,
                metadata=metadata,
                read_dictionary=[name for name in dictionaries if name in columns],  # others raise a KeyError
                page_checksum_verification=True,
            )
            size = os.fstat(opened.fileno()).st_size
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
            total = sum(max(chunk.total_uncompressed_size, 4 * chunk.num_values) for chunk in chunks)
            if total > max(FREE_BYTES, EXPANSION * size):
                problem = f"it declares {total} bytes of columns, but has {size} bytes"
                raise ConfigError(str(path), "", problem, "Write the file again", code="damaged-file")
            yield file
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        is_missing = isinstance(error, FileNotFoundError)
        problem = f"it cannot be read ({getattr(error, 'strerror', None) or printable(first_line(error))})"
        remedy = "Check the path" if is_missing else "Write the file again"
        code = "missing-file" if is_missing else "damaged-file"
        raise ConfigError(str(path), "", problem, remedy, code=code) from None
