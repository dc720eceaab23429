"""Pairs of sentences on their way from raw text to sub-words, in files and in other processes.

Other processes import this module, and so it imports nothing that imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from .corpus import Pair
from .tokenization import tokenize

_SEPARATORS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))
"""Characters at which some reader ends a line: fairseq does so at carriage returns, `str.splitlines` at all of them."""


class SentencePair(NamedTuple):
    """A pair on its way, and as it was read."""

    split: str
    pair: Pair
    raw: Pair


class PairWriter(ExitStack):
    """Files of pairs, one sentence a line for every reader: opened when the first pair of a split comes."""

    def __init__(self, folder: Path, codes: Pair):
        super().__init__()
        self.folder, self.codes = folder, codes
        self.files: dict[str, list[IO[str]]] = {}

    def write(self, row: SentencePair) -> None:
        if row.split not in self.files:
            paths = split_paths(self.folder, row.split, self.codes)
            opened = [open(path, "w", encoding="utf-8", newline="\n") for path in paths]  # noqa: SIM115, the stack closes
            self.files[row.split] = [self.enter_context(file) for file in opened]
        for file, line in zip(self.files[row.split], (*row.pair, *row.raw), strict=False):
            file.write(line.translate(_SEPARATORS) + "\n")


def split_paths(folder: Path, name: str, codes: Pair) -> list[Path]:
    """The two files of a split; two more keep the test as it was read."""
    kinds = ("", "raw.") if name == "test" else ("",)
    return [folder / f"{kind}{name}.{code}" for kind in kinds for code in codes]


def read_pairs(folder: Path, name: str, codes: Pair) -> Iterator[SentencePair]:
    """What a `PairWriter` wrote of a split: nothing where there were no pairs."""
    paths = split_paths(folder, name, codes)
    if not any(path.exists() for path in paths):
        return
    for lines in zip(*map(read_lines, paths), strict=True):
        yield SentencePair(name, lines[:2], lines[-2:])


def read_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")


def same(rows: list[SentencePair]) -> list[SentencePair]:
    return rows


def tokenized(rows: list[SentencePair], codes: Pair, normalize: bool, dashes: bool) -> list[SentencePair]:
    texts = [tokenize([row.pair[side] for row in rows], code, normalize, dashes) for side, code in enumerate(codes)]
    return [row._replace(pair=pair) for row, pair in zip(rows, zip(*texts, strict=True), strict=True)]


def segmented(
    rows: list[SentencePair], codes: Path, segment: Callable[[Sequence[str], Path], list[str]]
) -> list[SentencePair]:
    """Sub-words, by the function for the kind of the codes."""
    texts = [segment([row.pair[side] for row in rows], codes) for side in range(2)]
    return [row._replace(pair=pair) for row, pair in zip(rows, zip(*texts, strict=True), strict=True)]
