"""Parallel text as it is found: pairs of files, tables, SGML test sets, plain or compressed. Read as a stream."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from revnets.config.errors import nearest

Pair = tuple[str, str]
"""A sentence and its translation."""

# ISO 639-1, and the languages with a longer code that Moses' tokenizer has rules for.
_CODES = """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv
    ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne
    ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st
    su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu mni tdt yue
"""
LANGUAGES = frozenset(_CODES.split())


class TranslationError(ValueError):
    """Data cannot be used. The message is one line: what was given, what is wrong with it and what to do.

    `code` is the kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, message: str, code: str = "invalid-value"):
        super().__init__(message)
        self.code = code


DataError = TranslationError
"""The former name."""


@dataclass(frozen=True)
class Corpus:
    """Parallel text in one file or two.

    Attributes:
        paths: the source's and the target's file, line by line; or one file of tab-separated fields. A name that ends
            in .gz is decompressed while it is read. Of SGML files (.sgm) the segments are read.
        fields: which fields of a table hold source and target, counted from 1. The last two unless given.
    """

    paths: tuple[Path, ...]
    fields: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.paths) not in (1, 2):
            names = ", ".join(map(str, self.paths)) or "nothing"
            raise TranslationError(
                f"{names}: a corpus is one table, or two files of which line i translates line i", code="wrong-length"
            )

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))

    def pairs(self) -> Iterator[Pair]:
        """All pairs in order, without line ends. Fields are taken as they are, the empty ones too.

        Raises:
            TranslationError: a file is missing, empty, damaged, no UTF-8, or the two do not have equally many lines.
        """
        empty = True
        for pair in self._aligned() if len(self.paths) == 2 else self._table():
            empty = False
            yield pair
        if empty:
            raise TranslationError(f"{self}: there is no line in it. Give text, one sentence a line", code="empty-file")

    def _aligned(self) -> Iterator[Pair]:
        with ExitStack() as stack:
            streams = [lines_of(path) for path in self.paths]
            for stream in streams:
                stack.callback(stream.close)
            for number, (left, right) in enumerate(zip_longest(*streams), 1):
                if left is None or right is None:
                    if number == 1:
                        raise TranslationError(
                            f"{self.paths[left is not None]}: there is no line in it. Give aligned text",
                            code="empty-file",
                        )
                    short, long = self.paths if left is None else self.paths[::-1]
                    total = number + sum(1 for _ in streams[self.paths.index(long)])
                    raise TranslationError(
                        f"{short} has {number - 1} lines and {long} has {total}: line i of one must translate line i "
                        "of the other. Give files that were aligned",
                        code="misaligned-data",
                    )
                yield left, right

    def _table(self) -> Iterator[Pair]:
        (path,) = self.paths
        for number, line in enumerate(lines_of(path), 1):
            row = line.split("\t")
            left, right = self.fields or (len(row) - 1, len(row))
            if min(left, right) < 1 or max(left, right) > len(row):
                wanted = f"fields {left} and {right} are" if self.fields else "two are"
                found = f"{len(row)} field{'s' * (len(row) > 1)} between tabs"
                raise TranslationError(
                    f"{path}, line {number}: {found}, {wanted} needed. Give a table, two files, or other --fields",
                    code="wrong-format",
                )
            yield row[left - 1], row[right - 1]


def languages(text: str) -> Pair:
    """Read a pair of languages such as `en-de`.

    Raises:
        TranslationError: not two different codes of languages.
    """
    codes = text.split("-")
    if len(codes) != 2 or codes[0] == codes[1]:
        raise TranslationError(f"languages {text!r}: give source and target, such as en-de", code="invalid-syntax")
    for code in codes:
        known_language(code)
    return codes[0], codes[1]


def known_language(code: str) -> str:
    """The code itself.

    Raises:
        TranslationError: no language has it.
    """
    if code not in LANGUAGES:
        remedy = nearest(code, sorted(LANGUAGES), "Give a code of ISO 639-1, such as en or de; known are")
        raise TranslationError(f"language {code!r} is not known. {remedy}", code="unknown-choice")
    return code


SEGMENT = re.compile(r'<seg id="[^"]*">\s*(.*?)\s*</seg>')


def lines_of(path: Path) -> Generator[str]:
    """The lines of a text (.gz: decompressed; .sgm: its segments), which end at a line feed and nowhere else.

    Other separators of Unicode would shift one side against the other.

    Raises:
        TranslationError: the file is missing, damaged or no UTF-8.
    """
    number, raw = 0, b""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            sgml = ".sgm" in path.suffixes
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8").rstrip("\r\n")
                if number == 1:
                    line = line.removeprefix("\ufeff")
                if not sgml:
                    yield line
                elif found := SEGMENT.search(line):
                    yield found[1]
    except FileNotFoundError:
        raise TranslationError(f"{path}: there is no such file. Check the path", code="missing-file") from None
    except IsADirectoryError:
        raise TranslationError(f"{path}: this is a folder. Give the file with the text", code="not-a-file") from None
    except UnicodeDecodeError:
        code = "UTF-16" if number == 1 and raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "ISO-8859-1"
        fix = f"iconv -f {code} -t UTF-8 {path.name}"
        raise TranslationError(
            f"{path}, line {number}: not UTF-8. Convert it first, for instance with {fix}", code="invalid-encoding"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TranslationError(
            f"{path}: damaged gzip after line {number} ({error}). Get the file again", code="damaged-file"
        ) from None


def named(template: str, codes: Pair) -> tuple[Path, ...]:
    """The one or two paths that a template means: {lang} stands for each language, {role} for src and ref."""
    roles = zip(codes, ("src", "ref"), strict=True)
    return tuple(dict.fromkeys(Path(template.replace("{lang}", code).replace("{role}", role)) for code, role in roles))


def find_files(template: str, folders: Sequence[Path], codes: Pair) -> tuple[Path, ...]:
    """The files that a template means, each in the first of the folders that has it.

    Raises:
        TranslationError: none of the folders has a file.
    """
    found = []
    for name in named(template, codes):
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            places = ", ".join(map(str, folders))
            raise TranslationError(
                f"{name}: there is no such file in {places}. Check the name, and that the archive is whole",
                code="missing-file",
            )
        found.append(path)
    return tuple(found)
