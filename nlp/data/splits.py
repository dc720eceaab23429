"""Which pairs of the training text are for training, validation and test, and which are dropped."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

from .corpus import Pair
from .errors import TranslationError
from .recipe import Every, Recipe
from .resumable_steps import Facts

SPLITS = ("train", "valid", "test")
DROPPED, TRAIN, VALID = -1, 0, 1
"""What becomes of a pair; the others index SPLITS."""


def choose(pairs: Iterable[Pair], recipe: Recipe, unfit: np.ndarray | None = None) -> tuple[np.ndarray, Facts]:
    """Choose for every pair.

    Pairs with an empty side are dropped. With `deduplicate`, so are repetitions, and pairs that share a sentence with
    one that is drawn for validation or test: what was seen in training would measure memory.

    Args:
        unfit: bool [pairs], those that cleaning drops, as far as is known. They are not drawn: others take their
            places, and the other pairs that were drawn stay.

    Returns:
        One int8 a pair, DROPPED or an index of SPLITS, and how many were dropped for which reason.

    Raises:
        TranslationError: too few pairs.
    """
    choice, source, target, both = array("b"), array("q"), array("q"), array("q")
    wanted = drawn_counts(recipe)
    for pair in pairs:
        choice.append(TRAIN if pair[0].strip() and pair[1].strip() else DROPPED)
        if recipe.deduplicate:
            source.append(hash(pair[0]))
            target.append(hash(pair[1]))
            both.append(hash(pair))
    chosen = np.array(choice, dtype=np.int8)
    facts: Facts = {"pairs read": len(chosen), "empty": int((chosen == DROPPED).sum())}
    if recipe.deduplicate:
        repeated = chosen == TRAIN
        repeated[np.unique(np.array(both), return_index=True)[1]] = False
        facts["repeated"] = _drop(chosen, repeated)
    if isinstance(recipe.valid, Every):
        numbers = np.arange(1, len(chosen) + 1)  # counted as awk does, over everything that was read
        chosen[(numbers % recipe.valid.every == 0) & (chosen == TRAIN)] = VALID
        if not (chosen == VALID).any():
            raise TranslationError(
                f"no pair is the {recipe.valid.every}th of {len(chosen)}. Give a smaller valid.every",
                code="too-few-samples",
            )
    free = np.flatnonzero(chosen == TRAIN).tolist()
    if sum(wanted.values()) >= len(free):
        asked = " and ".join(f"{count} pairs for {name}" for name, count in wanted.items()) or "pairs for train"
        raise TranslationError(
            f"{asked} are asked for, but there are only {len(free)} in all. Give more text, or ask for less",
            code="too-few-samples",
        )
    for name, numbers in _drawn(free, wanted, recipe.seed, unfit).items():
        chosen[numbers] = SPLITS.index(name)
    if recipe.deduplicate:
        held = chosen > TRAIN
        like = [np.isin(side, np.array(side)[held]) for side in (source, target)]
        facts["like one held out"] = _drop(chosen, (like[0] | like[1]) & (chosen == TRAIN))
    if not (chosen == TRAIN).any():
        raise TranslationError(
            f"nothing is left for train out of {len(chosen)} pairs. Give more text", code="too-few-samples"
        )
    return chosen, facts


def drawn_counts(recipe: Recipe) -> dict[str, int]:
    """How many pairs are to be drawn, of the splits that are drawn."""
    return {name: count for name in SPLITS if isinstance(count := getattr(recipe, name, None), int)}


def _drawn(free: list[int], wanted: dict[str, int], seed: int, unfit: np.ndarray | None) -> dict[str, list[int]]:
    """Numbers of pairs for each split that is drawn."""
    rng = random.Random(seed)
    first = rng.sample(free, sum(wanted.values()))
    others: Iterator[int] = iter(())
    if unfit is not None:
        left = sorted(set(free).difference(first))
        rng.shuffle(left)
        fit = sum(1 for number in free if not unfit[number])
        if fit < len(first):
            asked = " and ".join(f"{count} for {name}" for name, count in wanted.items())
            raise TranslationError(
                f"only {fit} of {len(free)} pairs are left after cleaning, {asked} are to be drawn. Allow longer "
                "sentences (--max) or other ratios (--ratio), give more text, or ask for less",
                code="too-few-samples",
            )
        others = (number for number in left if not unfit[number])
    found, start = {}, 0
    for name, count in wanted.items():
        numbers = first[start : start + count]
        found[name] = [next(others) if unfit is not None and unfit[number] else number for number in numbers]
        start += count
    return found


def _drop(chosen: np.ndarray, which: np.ndarray) -> int:
    chosen[which] = DROPPED
    return int(which.sum())
