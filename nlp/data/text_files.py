"""Lines of text files, plain or gzipped, read in bounded memory and checked on the fly."""

from __future__ import annotations

import codecs
import gzip
import re
import stat
import zlib
from collections.abc import Generator, Iterator
from functools import partial
from io import BufferedReader
from pathlib import Path

from .errors import TranslationError

LONGEST = 1 << 20
"""Maximum bytes of a line. A longer line is not a sentence, but possibly a whole binary file."""

UNCHECKED = 8 << 20
"""Decompressed bytes between two checks of the compression ratio."""

EXPANSION = 200
"""Maximum compression ratio; that of text is about four."""

_FORMATS = {b"\x1f\x8b": ("gzip", "name it .gz"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz")}
_FORMATS |= {
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf": ("7z", "7z x"),
}
"""First bytes of compressed files, their formats, and the command that decompresses them."""

_SEGMENT = re.compile(r"<seg\b[^>]*>\s*(.*?)\s*</seg>", re.IGNORECASE)
_OPENING = re.compile(r"<seg\b", re.IGNORECASE)


def lines_of(path: Path) -> Generator[str]:
    """Yield the lines of a text file, or the segments of an SGML file (.sgm); .gz files are decompressed.

    Lines end at line feeds only: other Unicode separators within a sentence would misalign source and target.

    Raises:
        TranslationError: If the file is missing, damaged, not UTF-8, or not text.
    """
    number, raw = 0, b""
    try:
        _check_kind(path)
        sgml = ".sgm" in path.suffixes
        with open(path, "rb") as stored, gzip.GzipFile(fileobj=stored) if path.suffix == ".gz" else stored as file:
            for number, raw in enumerate(_bounded(path, stored, file), 1):
                if number == 1:
                    _check_text(path, raw)
                line = raw.decode("utf-8").rstrip("\r\n")
                if number == 1:
                    line = line.removeprefix("\ufeff")
                if sgml:
                    yield from _segments(path, number, line)
                else:
                    yield line
    except FileNotFoundError:
        raise TranslationError(f"{path}: no such file. Check the path", code="missing-file") from None
    except UnicodeDecodeError:
        raise _wrong_encoding(path, number, raw) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TranslationError(
            f"{path}: damaged gzip file after line {number} ({error}). Download it again", code="damaged-file"
        ) from None


def _check_kind(path: Path) -> None:
    """Refuse pipes, which block and cannot be read twice, and other special files."""
    try:
        mode = path.stat().st_mode
    except ValueError:  # NUL in the name
        raise TranslationError(f"{str(path)!r}: not a valid file name. Check the path", code="missing-file") from None
    if stat.S_ISDIR(mode):
        raise TranslationError(f"{path}: a directory. Give a text file", code="not-a-file")
    if not stat.S_ISREG(mode):
        raise TranslationError(
            f"{path}: a pipe or a device, but text is read more than once. Give a regular file", code="not-a-file"
        )


def _bounded(path: Path, stored: BufferedReader, file: gzip.GzipFile | BufferedReader) -> Iterator[bytes]:
    """Yield lines with their ends, reading at most `LONGEST` bytes of a line into memory."""
    size, checked = 0, UNCHECKED
    for number, raw in enumerate(iter(partial(file.readline, LONGEST + 1), b""), 1):
        if len(raw) > LONGEST:
            if number == 1:
                _check_text(path, raw)
            raise TranslationError(
                f"{path}, line {number}: longer than {LONGEST:,} bytes. Give text with one sentence per line",
                code="wrong-format",
            )
        size += len(raw)
        if size > checked and stored is not file:
            if size > EXPANSION * stored.tell():
                raise TranslationError(
                    f"{path}: expands to more than {EXPANSION} times its size, which text does not. Give text with one "
                    "sentence per line",
                    code="wrong-format",
                )
            checked += UNCHECKED
        yield raw


def _check_text(path: Path, first: bytes) -> None:
    """Check by its first line that a file is uncompressed text with line feeds."""
    if found := next((what for start, what in _FORMATS.items() if first.startswith(start)), None):
        raise TranslationError(
            f"{path}: compressed ({found[0]}), but only .gz files are decompressed. Decompress it first: {found[1]}",
            code="wrong-format",
        )
    if len(first) >= 8 and 10 * first.count(0) >= 9 * len(first):
        raise TranslationError(f"{path}: a binary file. Give text with one sentence per line", code="wrong-format")
    if len(first) >= 8 and 5 * first.count(0) >= 2 * len(first):
        raise _wrong_encoding(path, 1, first)
    if b"\r" in first.rstrip(b"\r\n") and not first.endswith(b"\n"):
        raise TranslationError(
            f"{path}: lines end with carriage returns instead of line feeds. Convert it: tr '\\r' '\\n' < {path.name}",
            code="wrong-format",
        )


def _wrong_encoding(path: Path, number: int, raw: bytes) -> TranslationError:
    encoding = "ISO-8859-1"
    if number == 1 and raw.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        encoding = "UTF-32"
    elif number == 1 and (raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw):
        encoding = "UTF-16"
    fix = f"iconv -f {encoding} -t UTF-8 {path.name}"
    return TranslationError(
        f"{path}, line {number}: not UTF-8. Convert it, for instance with {fix}", code="invalid-encoding"
    )


def _segments(path: Path, number: int, line: str) -> Iterator[str]:
    """Yield the segments of a line. A segment that spans lines is refused, because it would misalign all later ones."""
    found = _SEGMENT.findall(line)
    if len(found) != len(_OPENING.findall(line)):
        raise TranslationError(
            f"{path}, line {number}: a segment spans several lines. Write <seg ...> and </seg> on one line",
            code="wrong-format",
        )
    yield from found
