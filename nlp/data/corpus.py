"""Readers of parallel text: pairs of files, tables and SGML test sets, plain or gzipped, as streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from .errors import DataError as DataError
from .errors import TranslationError as TranslationError
from .languages import LANGUAGES as LANGUAGES
from .languages import base_language
from .languages import known_language as known_language
from .languages import languages as languages
from .text_files import lines_of as lines_of

Pair = tuple[str, str]
"""Source and target: a sentence and its translation, or two language codes."""

_ROLES = ({"source", "src", "original", "input"}, {"target", "tgt", "trg", "translation", "reference", "ref", "output"})
_NAMES = dict(
    ar="arabic", bg="bulgarian", cs="czech", da="danish", de="german", el="greek", en="english", es="spanish",
    et="estonian", fi="finnish", fr="french", he="hebrew", hi="hindi", hu="hungarian", it="italian", ja="japanese",
    ko="korean", lt="lithuanian", lv="latvian", nl="dutch", no="norwegian", pl="polish", pt="portuguese",
    ro="romanian", ru="russian", sk="slovak", sl="slovenian", sv="swedish", tr="turkish", uk="ukrainian",
    vi="vietnamese", zh="chinese",
)  # fmt: skip
"""Column names in the header of a table: roles, and names of languages."""


@dataclass(frozen=True)
class Corpus:
    """Parallel text in one or two files.

    Attributes:
        paths: Source and target file, aligned line by line; or one file of tab-separated fields. Files that end in
            .gz are decompressed on the fly. From SGML files (.sgm), the segments are read.
        fields: Fields of a table with source and target, counted from 1. By default the last two.
        languages: Languages of source and target, to recognize the header of a table.
    """

    paths: tuple[Path, ...]
    fields: tuple[int, int] | None = None
    languages: Pair | None = None

    def __post_init__(self) -> None:
        if len(self.paths) not in (1, 2):
            names = ", ".join(map(str, self.paths)) or "nothing"
            raise TranslationError(
                f"{names}: a corpus is one table, or two files where line i translates line i", code="wrong-length"
            )

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))

    def pairs(self) -> Iterator[Pair]:
        """Yield all pairs in order, without line ends and without the header of a table.

        Empty fields are yielded too.

        Raises:
            TranslationError: If a file is missing, empty, damaged or not UTF-8, or if two files have different numbers
                of lines.
        """
        empty = True
        for number, pair in enumerate(self._aligned() if len(self.paths) == 2 else self._table()):
            empty = False
            if number or len(self.paths) == 2 or not self._names_columns(pair):
                yield pair
        if empty:
            raise TranslationError(f"{self}: the file is empty. Give text, one sentence per line", code="empty-file")

    def header(self) -> Pair | None:
        """Return the first line of a table if it names the columns, as in `source<tab>target` or `en<tab>de`."""
        first = next(self._table(), None) if len(self.paths) == 1 else None
        return first if first and self._names_columns(first) else None

    def _names_columns(self, pair: Pair) -> bool:
        names = [cell.strip("\"' ").casefold() for cell in pair]
        if any(names[0] in left and names[1] in right for left, right in (_ROLES, _ROLES[::-1])):
            return True
        known = [{code.casefold(), base, _NAMES.get(base, base)} for code, base in self._codes()]
        return len(known) == 2 and any(names[0] in left and names[1] in right for left, right in (known, known[::-1]))

    def _codes(self) -> list[tuple[str, str]]:
        return [(code, base_language(code)) for code in self.languages or ()]

    def _aligned(self) -> Iterator[Pair]:
        with ExitStack() as stack:
            streams = [lines_of(path) for path in self.paths]
            for stream in streams:
                stack.callback(stream.close)
            for number, (left, right) in enumerate(zip_longest(*streams), 1):
                if left is None or right is None:
                    if number == 1:
                        raise TranslationError(
                            f"{self.paths[left is not None]}: the file is empty. Give aligned text",
                            code="empty-file",
                        )
                    short, long = self.paths if left is None else self.paths[::-1]
                    total = number + sum(1 for _ in streams[self.paths.index(long)])
                    raise TranslationError(
                        f"{short} has {number - 1} line{'s' * (number != 2)}, but {long} has {total}. Give "
                        "aligned files, where line i of one translates line i of the other",
                        code="misaligned-data",
                    )
                yield left, right

    def _table(self) -> Iterator[Pair]:
        (path,) = self.paths
        count = 0
        for number, line in enumerate(lines_of(path), 1):
            row = line.split("\t")
            count = count or len(row)
            left, right = self.fields or (len(row) - 1, len(row))
            if min(left, right) < 1 or max(left, right) > len(row):
                needed = f"fields {left} and {right} are" if self.fields else "two are"
                found = f"{len(row)} tab-separated field{'s' * (len(row) > 1)}"
                raise TranslationError(
                    f"{path}, line {number}: {found}, but {needed} needed. Give a table, two files, or other --fields",
                    code="wrong-format",
                )
            if not self.fields and len(row) != count:
                raise TranslationError(
                    f"{path}, line {number}: {len(row)} tab-separated fields, but line 1 has {count}. Use the same "
                    "number in every line, or select two with --fields",
                    code="wrong-format",
                )
            yield row[left - 1], row[right - 1]


def named(template: str, codes: Pair) -> tuple[Path, ...]:
    """Expand a template of file names.

    Args:
        template: File name. `{lang}` stands for both languages, `{role}` for src and ref.
        codes: Languages of source and target.

    Returns:
        Two paths, or one if the template has no placeholder.
    """
    roles = zip(codes, ("src", "ref"), strict=True)
    return tuple(dict.fromkeys(Path(template.replace("{lang}", code).replace("{role}", role)) for code, role in roles))


def find_files(template: str, folders: Sequence[Path], codes: Pair) -> tuple[Path, ...]:
    """Find the files of a template, each in the first directory that contains it.

    Args:
        template: File name with placeholders, see `named`.
        folders: Directories to search, in order.
        codes: Languages of source and target.

    Raises:
        TranslationError: If no directory contains a file.
    """
    found = []
    for name in named(template, codes):
        path = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if path is None:
            places = ", ".join(map(str, folders))
            raise TranslationError(
                f"{name}: no such file in {places}. Check the name, and that the archive is complete",
                code="missing-file",
            )
        found.append(path)
    return tuple(found)
