"""Mixtures of training sets: shares by weights, and every sample once before any is repeated."""

from __future__ import annotations

from collections import Counter

import pytest

from vision.data.samplers import Key
from vision.pseudo_labels.mixture import Mixture


class Numbers:
    """A set that returns the keys that it is indexed by."""

    def __init__(self, name: str, size: int):
        self.name, self.size = name, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, key: Key) -> tuple[str, Key]:
        return self.name, key


def epoch(mixture: Mixture, number: int) -> list[tuple[str, Key]]:
    return [mixture[Key(number, index)] for index in range(len(mixture))]


def test_without_weights_an_epoch_has_every_sample_once():
    mixture = Mixture([Numbers("a", 7), Numbers("b", 13)])
    for number in range(3):
        wanted = {("a", Key(number, index)) for index in range(7)} | {("b", Key(number, index)) for index in range(13)}
        found = epoch(mixture, number)
        assert len(found) == 20
        assert set(found) == wanted


def test_weights_are_shares_of_an_epoch():
    mixture = Mixture([Numbers("a", 10), Numbers("b", 100), Numbers("c", 10)], [3.0, 2.0, 1.0])
    assert len(mixture) == 120
    assert Counter(name for name, _ in epoch(mixture, 5)) == {"a": 60, "b": 40, "c": 20}


@pytest.mark.parametrize("scale", [1.7e308, 5e-324])
def test_shares_of_huge_and_tiny_weights_are_finite(scale):
    assert Mixture([Numbers("a", 7), Numbers("b", 13)], [scale, scale]).counts == [10, 10]


@pytest.mark.parametrize("size", [1, 2, 6, 11, 89, 360])
def test_every_sample_is_used_once_before_any_is_repeated(size):
    """Also where epochs end in its middle; a repeated sample has another key, and so another augmentation."""
    mixture = Mixture([Numbers("a", size), Numbers("b", 40)], [1.0, 2.0])
    seen = [key for number in range(60) for name, key in epoch(mixture, number) if name == "a"]
    assert len(set(seen)) == len(seen)
    for turn in range(len(seen) // size):
        assert {key.index for key in seen[turn * size : (turn + 1) * size]} == set(range(size))


def test_a_part_of_an_epoch_covers_a_sorted_set_evenly():
    mixture = Mixture([Numbers("a", 1000), Numbers("b", 10)], [1.0, 9.0])
    tenths = Counter(key.index // 100 for name, key in epoch(mixture, 0) if name == "a")
    assert set(tenths) == set(range(10))
    assert sum(tenths.values()) == 101
    assert 8 <= min(tenths.values()) <= max(tenths.values()) <= 15  # a tenth of 101 is 10
