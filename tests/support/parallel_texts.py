"""Parallel texts of a small language, and the steps that split them into subwords."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from nlp.data import prepare
from nlp.data.recipe import Recipe
from nlp.data.resumable_steps import Facts, Stages

QUIET = Console(file=io.StringIO())


def numbered_pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return pairs of sentences that end in the same number, which shows that they belong together."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(40)]
    lines = [rng.choices(words, k=rng.randint(3, 9)) for _ in range(count)]
    return [
        (f"{' '.join(line)} {number}", f"{' '.join(word[::-1] for word in line)} {number}")
        for number, line in enumerate(lines)
    ]


def write_pairs(folder: Path, pairs: list[tuple[str, str]], name: str = "train") -> list[Path]:
    """Write one file per side."""
    paths = [folder / f"{name}.{code}" for code in ("en", "de")]
    for side, path in enumerate(paths):
        path.write_bytes("".join(pair[side] + "\n" for pair in pairs).encode())
    return paths


def recipe_for(texts: list[Path], **given: Any) -> Recipe:
    size = {} if "subword" in given else {"merges": 20}
    return Recipe(**{"languages": "en-de", "train": (tuple(texts),), "valid": 5, "test": 7, **size, **given})


def sub_words(recipe: Recipe, work: Path) -> tuple[Path, Facts]:
    """Split text into subwords by the steps of `prepare`, without fairseq; return the directory and the statistics."""
    steps = prepare._Steps(recipe, (Path(),), work, 1, Progress(console=QUIET, disable=True))
    steps, facts = prepare._cleaned(steps, Stages(prepare._inputs(recipe, Path())))
    return steps.work / "units", facts


def counts_of_lines(path: Path) -> set[int]:
    """Return the number of lines if they end at line feeds, also at carriage returns, or at all separators."""
    text = path.read_bytes().decode()
    return {text.count("\n"), len(io.StringIO(text, newline=None).readlines()), len(text.splitlines())}
