"""Joint byte-pair encoding of tokenized text with subword-nmt (Sennrich et al., 2016)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr
from functools import lru_cache
from io import StringIO
from pathlib import Path

from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

MARK = "@@"
"""Suffix of every subword that does not end its word; fairseq's `--remove-bpe` removes it."""


@lru_cache(maxsize=2)
def _bpe(codes: Path, modified: int) -> BPE:
    with open(codes, encoding="utf-8") as file:
        return BPE(file)


def learn(
    lines: Iterable[str], merges: int, codes: Path, merged: Callable[[], object] = lambda: None, total: bool = False
) -> int:
    """Learn byte-pair encoding and write its merge operations, one per line.

    Args:
        lines: Tokenized training text.
        merges: Number of merge operations.
        codes: File to write.
        merged: Called after every operation.
        total: Treat `merges` as the size of the vocabulary, which includes the characters of the text.

    Returns:
        The number of operations learned. It is smaller than requested if no pair of symbols occurs twice anymore.
    """
    words = Counter[str]()
    for line in lines:
        words.update(line.split())
    learned = -1  # the first line holds the version

    class Lines:
        def write(self, text: str) -> None:
            nonlocal learned
            file.write(text)
            learned += 1
            merged()

    with open(codes, "w", encoding="utf-8") as file, redirect_stderr(StringIO()):  # hide subword-nmt's progress bar
        counts = [f"{word} {count}\n" for word, count in words.items()]
        learn_bpe(counts, Lines(), merges, is_dict=True, total_symbols=total)
    return learned


def segment(lines: Sequence[str], codes: Path) -> list[str]:
    """Split tokens into subwords separated by spaces.

    Args:
        lines: Tokenized sentences.
        codes: File that `learn` wrote.
    """
    bpe = _bpe(codes, codes.stat().st_mtime_ns)
    return [bpe.process_line(line) for line in lines]


def join(line: str) -> str:
    """Join the subwords of a sentence to words separated by spaces."""
    return (line + " ").replace(MARK + " ", "").rstrip()
