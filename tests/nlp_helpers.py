"""A small corpus that can be learnt, fairseq's commands on it, and models without a command."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = 30


def write_corpus(folder: Path, pairs: int, seed: int = 0) -> None:
    """Word-for-word translations of random sentences, split into train, valid and test, some words in two parts."""
    rng = random.Random(seed)
    table = dict(zip(range(WORDS), rng.sample(range(WORDS), WORDS), strict=True))
    for split, count in (("train", pairs), ("valid", pairs // 8), ("test", pairs // 8)):
        sentences = [[rng.randrange(WORDS) for _ in range(rng.randint(2, 7))] for _ in range(count)]
        for language, words in (("en", sentences), ("de", [[table[word] for word in line] for line in sentences])):
            lines = [" ".join(spell(word, language) for word in line) for line in words]
            (folder / f"{split}.{language}").write_text("\n".join(lines) + "\n")


def spell(word: int, language: str) -> str:
    """Every third word consists of two sub-words, as subword-nmt writes them."""
    return f"{language}{word}@@ s" if word % 3 == 0 else f"{language}{word}"
