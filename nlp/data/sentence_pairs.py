"""Sentence pairs between raw text and subwords: files, and functions for worker processes.

Worker processes import this module, so it imports nothing that imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, NamedTuple

from .corpus import Pair
from .subwords.moses import tokenize

_SEPARATORS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))
"""Characters that end a line for some reader: carriage returns for fairseq, all of them for `str.splitlines`."""


class SentencePair(NamedTuple):
    """A pair in the current step of the pipeline.

    Attributes:
        split: Train, valid or test.
        pair: Source and target as processed so far.
        raw: Source and target as read.
    """

    split: str
    pair: Pair
    raw: Pair


class PairWriter(ExitStack):
    """Writes pairs to files, one sentence per line for every reader. Opens the files of a split at its first pair.

    Args:
        folder: Directory of the files.
        codes: Languages of source and target.
    """

    def __init__(self, folder: Path, codes: Pair):
        super().__init__()
        self.folder, self.codes = folder, codes
        self.files: dict[str, list[IO[str]]] = {}

    def write(self, row: SentencePair) -> None:
        """Append a pair to the files of its split."""
        if row.split not in self.files:
            paths = split_paths(self.folder, row.split, self.codes)
            opened = [open(path, "w", encoding="utf-8", newline="\n") for path in paths]  # noqa: SIM115, closed by the stack
            self.files[row.split] = [self.enter_context(file) for file in opened]
        for file, line in zip(self.files[row.split], (*row.pair, *row.raw), strict=False):
            file.write(line.translate(_SEPARATORS) + "\n")


def split_paths(folder: Path, name: str, codes: Pair) -> list[Path]:
    """Return the two files of a split; the test split has two more for its raw text."""
    kinds = ("", "raw.") if name == "test" else ("",)
    return [folder / f"{kind}{name}.{code}" for kind in kinds for code in codes]


def read_pairs(folder: Path, name: str, codes: Pair) -> Iterator[SentencePair]:
    """Yield the pairs of a split that a `PairWriter` wrote; none if it has no files."""
    paths = split_paths(folder, name, codes)
    if not any(path.exists() for path in paths):
        return
    for lines in zip(*map(read_lines, paths), strict=True):
        yield SentencePair(name, lines[:2], lines[-2:])


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file of this pipeline, which end at line feeds only."""
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.rstrip("\n")


def same(rows: list[SentencePair]) -> list[SentencePair]:
    """Return the pairs unchanged."""
    return rows


def tokenized(rows: list[SentencePair], codes: Pair, normalize: bool, dashes: bool) -> list[SentencePair]:
    """Tokenize both sides, see `nlp.data.subwords.moses.tokenize`."""
    texts = [tokenize([row.pair[side] for row in rows], code, normalize, dashes) for side, code in enumerate(codes)]
    return [row._replace(pair=pair) for row, pair in zip(rows, zip(*texts, strict=True), strict=True)]


def segmented(
    rows: list[SentencePair], codes: Path, segment: Callable[[Sequence[str], Path], list[str]]
) -> list[SentencePair]:
    """Split both sides into subwords.

    Args:
        rows: Pairs to split.
        codes: File of merge operations, or of a sentencepiece model.
        segment: Function that splits sentences by this file.
    """
    texts = [segment([row.pair[side] for row in rows], codes) for side in range(2)]
    return [row._replace(pair=pair) for row, pair in zip(rows, zip(*texts, strict=True), strict=True)]
