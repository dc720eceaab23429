"""Parallel text as it is found: pairs of files, tables, SGML test sets, plain or compressed. Read as a stream."""

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
"""A sentence and its translation."""

_ROLES = ({"source", "src", "original", "input"}, {"target", "tgt", "trg", "translation", "reference", "ref", "output"})
_NAMES = dict(
    ar="arabic", bg="bulgarian", cs="czech", da="danish", de="german", el="greek", en="english", es="spanish",
    et="estonian", fi="finnish", fr="french", he="hebrew", hi="hindi", hu="hungarian", it="italian", ja="japanese",
    ko="korean", lt="lithuanian", lv="latvian", nl="dutch", no="norwegian", pl="polish", pt="portuguese",
    ro="romanian", ru="russian", sk="slovak", sl="slovenian", sv="swedish", tr="turkish", uk="ukrainian",
    vi="vietnamese", zh="chinese",
)  # fmt: skip
"""Names of columns of a table, by role and by language."""


@dataclass(frozen=True)
class Corpus:
    """Parallel text in one file or two.

    Attributes:
        paths: the source's and the target's file, line by line; or one file of tab-separated fields. A name that ends
            in .gz is decompressed while it is read. Of SGML files (.sgm) the segments are read.
        fields: which fields of a table hold source and target, counted from 1. The last two unless given.
        languages: of source and target, by whose names the header of a table is recognized.
    """

    paths: tuple[Path, ...]
    fields: tuple[int, int] | None = None
    languages: Pair | None = None

    def __post_init__(self) -> None:
        if len(self.paths) not in (1, 2):
            names = ", ".join(map(str, self.paths)) or "nothing"
            raise TranslationError(
                f"{names}: a corpus is one table, or two files of which line i translates line i", code="wrong-length"
            )

    def __str__(self) -> str:
        return " and ".join(map(str, self.paths))

    def pairs(self) -> Iterator[Pair]:
        """All pairs in order, without line ends and the header of a table. Fields are taken as they are, the empty
        ones too.

        Raises:
            TranslationError: a file is missing, empty, damaged, no UTF-8, or the two do not have equally many lines.
        """
        empty = True
        for number, pair in enumerate(self._aligned() if len(self.paths) == 2 else self._table()):
            empty = False
            if number or len(self.paths) == 2 or not self._names_columns(pair):
                yield pair
        if empty:
            raise TranslationError(f"{self}: there is no line in it. Give text, one sentence a line", code="empty-file")

    def header(self) -> Pair | None:
        """The first line of a table if it names the columns, as in `source<tab>target`, `en<tab>de`."""
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
        count = 0
        for number, line in enumerate(lines_of(path), 1):
            row = line.split("\t")
            count = count or len(row)
            left, right = self.fields or (len(row) - 1, len(row))
            if min(left, right) < 1 or max(left, right) > len(row):
                wanted = f"fields {left} and {right} are" if self.fields else "two are"
                found = f"{len(row)} field{'s' * (len(row) > 1)} between tabs"
                raise TranslationError(
                    f"{path}, line {number}: {found}, {wanted} needed. Give a table, two files, or other --fields",
                    code="wrong-format",
                )
            if not self.fields and len(row) != count:
                raise TranslationError(
                    f"{path}, line {number}: {len(row)} fields between tabs, but line 1 has {count}. Give as many in "
                    "every line, or say which hold the pair with --fields",
                    code="wrong-format",
                )
            yield row[left - 1], row[right - 1]


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
