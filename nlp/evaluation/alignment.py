"""Check that two texts have the same sentences in the same order, up to spaces, punctuation and case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

SAMPLE = 2000
"""Maximum number of lines to compare, evenly spaced."""

SAME, OTHER = 0.9, 0.4
"""Similarity from which two lines count as the same sentence, and below which they may differ."""

PARAPHRASE = 0.45
"""Mean similarity from which two texts count as translations of one source; that of unrelated texts is 0.3."""


def first_mismatch(lines: Sequence[str], others: Sequence[str]) -> int | None:
    """Find the first line that differs from its counterpart in two misaligned texts.

    Texts are aligned if nearly all lines are equal, or if lines are clearly more similar to their counterparts than to
    the next lines, as in a second translation of the same source.

    Args:
        lines: Sentences of one text.
        others: The same number of sentences of the other text.

    Returns:
        The index of the line, or None if the texts are aligned.
    """
    chosen = range(0, len(lines), -(-len(lines) // SAMPLE))
    ours, theirs = [[_pairs(text[index]) for index in chosen] for text in (lines, others)]
    found = [_similarity(*pair) for pair in zip(ours, theirs, strict=True)]
    mean = sum(found) / len(found)
    different = [place for place, value in enumerate(found) if value < OTHER and ours[place] and theirs[place]]
    if not different or len(found) < 2:
        return None
    if sum(value >= SAME for value in found) > len(found) / 4:
        return chosen[different[0]] if len(different) > len(found) / 20 else None
    shifted = [_similarity(*pair) for pair in zip(ours, theirs[1:] + theirs[:1], strict=True)]
    unrelated = max(
        1.75 * sum(shifted) / len(shifted), 0.1
    )  # shared names give this similarity to a text and its translation
    return chosen[different[0]] if mean < min(unrelated, PARAPHRASE) else None


def _pairs(text: str) -> Counter[tuple[str, str]]:
    """Count pairs of neighboring letters and digits."""
    letters = [letter for letter in text.replace("<<unk>>", "").casefold() if letter.isalnum()]
    return Counter(pairwise(letters))


def _similarity(one: Counter[tuple[str, str]], other: Counter[tuple[str, str]]) -> float:
    """Compute Dice's coefficient, between 0 and 1."""
    total = one.total() + other.total()
    return 2 * (one & other).total() / total if total else 1.0
