"""Lines of text files, plain or compressed: checked while they are read, so that no file takes unbounded memory."""

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
"""Bytes of a line. A longer one is no sentence, and may be the whole of a file that is no text."""

UNCHECKED = 8 << 20
"""So many bytes are decompressed before their number is compared with that of the file."""

EXPANSION = 200
"""How many times its own size a compressed text may have. Text is compressed to about a quarter."""

_FORMATS = {b"\x1f\x8b": ("gzip", "name it .gz"), b"BZh": ("bzip2", "bunzip2"), b"\xfd7zXZ": ("xz", "unxz")}
_FORMATS |= {
    b"\x28\xb5\x2f\xfd": ("Zstandard", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"7z\xbc\xaf": ("7z", "7z x"),
}
"""How compressed files begin, their formats, and what helps."""

_SEGMENT = re.compile(r"<seg\b[^>]*>\s*(.*?)\s*</seg>", re.IGNORECASE)
_OPENING = re.compile(r"<seg\b", re.IGNORECASE)


def lines_of(path: Path) -> Generator[str]:
    """The lines of a text (.gz: decompressed; .sgm: its segments), which end at a line feed and nowhere else.

    Other separators of Unicode would shift one side against the other.

    Raises:
        TranslationError: the file is missing, damaged, no UTF-8, or no text.
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
        raise TranslationError(f"{path}: there is no such file. Check the path", code="missing-file") from None
    except UnicodeDecodeError:
        raise _wrong_encoding(path, number, raw) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TranslationError(
            f"{path}: damaged gzip after line {number} ({error}). Get the file again", code="damaged-file"
        ) from None


def _check_kind(path: Path) -> None:
    """A pipe would block, and cannot be read twice."""
    try:
        mode = path.stat().st_mode
    except ValueError:  # a NUL in the name
        raise TranslationError(f"{str(path)!r}: no file has this name. Check it", code="missing-file") from None
    if stat.S_ISDIR(mode):
        raise TranslationError(f"{path}: this is a folder. Give the file with the text", code="not-a-file")
    if not stat.S_ISREG(mode):
        raise TranslationError(
            f"{path}: this is a pipe or a device, but text is read more than once. Give a file", code="not-a-file"
        )


def _bounded(path: Path, stored: BufferedReader, file: gzip.GzipFile | BufferedReader) -> Iterator[bytes]:
    """Lines with their ends, none of which is read into memory beyond `LONGEST`."""
    size, checked = 0, UNCHECKED
    for number, raw in enumerate(iter(partial(file.readline, LONGEST + 1), b""), 1):
        if len(raw) > LONGEST:
            if number == 1:
                _check_text(path, raw)
            raise TranslationError(
                f"{path}, line {number}: longer than {LONGEST:,} bytes, which is no sentence. Give text, one sentence "
                "a line",
                code="wrong-format",
            )
        size += len(raw)
        if size > checked and stored is not file:
            if size > EXPANSION * stored.tell():
                raise TranslationError(
                    f"{path}: more than {EXPANSION} times as large when decompressed, which is no text. Give text, one "
                    "sentence a line",
                    code="wrong-format",
                )
            checked += UNCHECKED
        yield raw


def _check_text(path: Path, first: bytes) -> None:
    """The first line of a file shows whether it is text with line feeds."""
    if found := next((what for start, what in _FORMATS.items() if first.startswith(start)), None):
        raise TranslationError(
            f"{path}: compressed ({found[0]}); text is read as it is, or from .gz. Decompress it first: {found[1]}",
            code="wrong-format",
        )
    if len(first) >= 8 and 10 * first.count(0) >= 9 * len(first):
        raise TranslationError(f"{path}: binary, no text. Give text, one sentence a line", code="wrong-format")
    if len(first) >= 8 and 5 * first.count(0) >= 2 * len(first):
        raise _wrong_encoding(path, 1, first)
    if b"\r" in first.rstrip(b"\r\n") and not first.endswith(b"\n"):
        raise TranslationError(
            f"{path}: lines end at carriage returns, not at line feeds. Convert it: tr '\\r' '\\n' < {path.name}",
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
        f"{path}, line {number}: not UTF-8. Convert it first, for instance with {fix}", code="invalid-encoding"
    )


def _segments(path: Path, number: int, line: str) -> Iterator[str]:
    """The segments of a line, each of which ends on its line: one that is overlooked would shift all behind it."""
    found = _SEGMENT.findall(line)
    if len(found) != len(_OPENING.findall(line)):
        raise TranslationError(
            f"{path}, line {number}: a segment does not end on its line. Write <seg ...> and </seg> on one line",
            code="wrong-format",
        )
    yield from found
