"""Validation and test have the requested number of pairs after cleaning."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.errors import raises_error
from tests.support.parallel_texts import numbered_pairs, recipe_for, sub_words, write_pairs

pytest.importorskip("fairseq")

from nlp.data.corpus import TranslationError
from nlp.data.splits import DROPPED, SPLITS, choose


def uneven(count: int) -> list[tuple[str, str]]:
    """Pairs, two of five with a length ratio that is too large."""
    pairs = numbered_pairs(count)
    return [(left, f"{right} " * 6 if number % 5 < 2 else right) for number, (left, right) in enumerate(pairs)]


def numbers(folder, name: str) -> list[int]:
    return [int(re.sub("@@ ", "", line).split()[-1]) for line in (folder / f"{name}.en").read_text().splitlines()]


@pytest.mark.parametrize("merges", [None, 30])
def test_cleaning_leaves_the_requested_number_of_pairs(tmp_path, merges):
    texts = write_pairs(tmp_path, uneven(400))
    given = {"valid": 50, "test": 60, "tokenize": False, "merges": merges, "clean": {"max": 60, "ratio": 2.5}}
    units, facts = sub_words(recipe_for(texts, **given), tmp_path / "work")
    assert (facts["valid"], facts["test"]) == (50, 60)
    found = {name: numbers(units, name) for name in SPLITS}
    assert [len(found[name]) for name in SPLITS] == [facts[name] for name in SPLITS]
    assert all(number % 5 >= 2 for name in SPLITS for number in found[name])
    assert len({number for name in SPLITS for number in found[name]}) == sum(map(len, found.values()))
    dropped = ("empty", "too long", "too short", "length ratio too large")
    assert sum(facts.get(key, 0) for key in (*SPLITS, *dropped)) == facts["pairs read"] == 400

    again, same = sub_words(recipe_for(texts, **given), tmp_path / "again")
    assert same == facts
    assert {name: numbers(again, name) for name in SPLITS} == found


def test_codes_are_learned_without_drawn_pairs(tmp_path):
    texts = write_pairs(tmp_path, uneven(200))
    given = {"valid": 30, "test": 30, "clean": {"max": 60, "ratio": 2.5}}
    units, _ = sub_words(recipe_for(texts, **given), tmp_path / "work")
    learned_from = {int(line.split()[-1]) for line in (units.parent / "tokens" / "train.en").read_text().splitlines()}
    assert not learned_from & {*numbers(units, "valid"), *numbers(units, "test")}


def test_drawn_pairs_stay_unless_cleaning_drops_them():
    """Test sets of two recipes with different cleaning share most pairs."""
    pairs = numbered_pairs(300)
    recipe = recipe_for([Path("x"), Path("y")], valid=40, test=50, deduplicate=True)
    first, _ = choose(pairs, recipe)
    unfit = np.zeros(300, bool)
    unfit[::3] = True
    second, _ = choose(pairs, recipe, unfit)
    for index, count in ((1, 40), (2, 50)):
        assert (second == index).sum() == count
        kept = (first == index) & ~unfit
        assert kept.any()
        assert (second[kept] == index).all()
    assert not (unfit & (second > 0)).any()
    assert (second != DROPPED).all()


def test_too_few_pairs_are_left_after_cleaning(tmp_path):
    texts = write_pairs(tmp_path, uneven(100))
    recipe = recipe_for(texts, valid=30, test=40, clean={"max": 60, "ratio": 2.5})
    with raises_error(TranslationError, code="too-few-samples", names=["60 of 100", "30 for valid", "40 for test"]):
        sub_words(recipe, tmp_path / "work")
