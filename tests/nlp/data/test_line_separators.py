"""Characters that end a line for some programs never misalign source and target."""

from __future__ import annotations

import pytest

from tests.support.errors import raises_error
from tests.support.parallel_texts import QUIET, counts_of_lines, numbered_pairs, recipe_for, sub_words, write_pairs

pytest.importorskip("fairseq")

from nlp.data import binarization
from nlp.data.corpus import TranslationError
from nlp.data.prepare import prepare
from nlp.data.splits import SPLITS
from tests.nlp.data.test_prepare import decoded

pytestmark = pytest.mark.usefixtures("forked_preprocess")

SEPARATORS = [
    "\r",
    "\r\r",
    "\v",
    "\f",
    "\x1c",
    "\x1d",
    "\x1e",
    "\x1f",
    "\x85",
    "\u2028",
    "\u2029",
    "\0",
    "\ufeff",
    "\xa0",
]
KINDS = {
    "untouched": {"tokenize": False, "merges": None},
    "segmented": {"tokenize": False},
    "tokenized": {},
    "test not normalized": {"normalize": "train", "clean": None},
}


def separated(pairs: list[tuple[str, str]], side: int) -> list[tuple[str, str]]:
    """Separators within, before and after the sentences of one side."""
    found = []
    for number, pair in enumerate(pairs):
        mark = SEPARATORS[number % len(SEPARATORS)]
        text = pair[side].replace(" ", f" {mark} ", 1)
        text = f"{mark}{text}" if number % 3 == 1 else f"{text}{mark}" if number % 3 == 2 else text
        found.append((text, pair[1]) if side == 0 else (pair[0], text))
    return found


def texts(folder, side):
    pairs = separated(numbered_pairs(140), side)
    return write_pairs(folder, pairs[:100]), write_pairs(folder, pairs[100:], "test")


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_sees_as_many_lines_on_both_sides(tmp_path, kind, side):
    train, test = texts(tmp_path, side)
    units, facts = sub_words(recipe_for(train, test=tuple(test), **KINDS[kind]), tmp_path / "work")
    assert (facts["valid"], facts["test"]) == (5, 40)
    for name in (*SPLITS, "raw.test"):
        wanted = facts[name.removeprefix("raw.")]
        assert counts_of_lines(units / f"{name}.en") == counts_of_lines(units / f"{name}.de") == {wanted}
        lines = [(units / f"{name}.{code}").read_text().splitlines() for code in ("en", "de")]
        for left, right in zip(*lines, strict=True):
            assert (
                left.replace("@@ ", "").strip("\0\ufeff").split()[-1]
                == right.replace("@@ ", "").strip("\0\ufeff").split()[-1]
            )


@pytest.mark.parametrize("kind", ["untouched", "tokenized"])
def test_fairseq_reads_the_pairs_that_were_written(tmp_path, kind):
    train, test = texts(tmp_path, 0)
    facts = prepare(recipe_for(train, test=tuple(test), **KINDS[kind]), tmp_path / "bin", console=QUIET)
    for name in SPLITS:
        left, right = (decoded(tmp_path / "bin", name, code) for code in ("en", "de"))
        assert len(left) == len(right) == facts[name]
        numbers = [[line.strip("\0\ufeff ").split()[-1] for line in side] for side in (left, right)]
        assert numbers[0] == numbers[1]


def test_sides_are_compared_with_what_was_written(tmp_path):
    """Another program splits a sentence between two steps, in a directory with a comma."""
    units = tmp_path / "a,b" / "units"
    units.mkdir(parents=True)
    for name in SPLITS:
        write_pairs(units, numbered_pairs(9), name)
    (units / "valid.de").write_bytes((units / "valid.de").read_bytes().replace(b" ", b"\r", 1))
    folder = tmp_path / "a,b" / "bin"
    folder.mkdir()
    binarization.run_preprocess(units, folder, ("en", "de"), None, 1, tmp_path / "log")
    assert binarization.count_sentences(folder / "valid.en-de.de.idx") == 10
    with raises_error(TranslationError, code="misaligned-data", names=["10 sentences", "has 9", "valid.de"]):
        binarization.check_sentences(folder, ("en", "de"), dict.fromkeys(SPLITS, 9))
