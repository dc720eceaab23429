"""Assignment of pairs to training, validation and test, and deduplication."""

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
"""Values of an assignment: dropped, or an index of SPLITS."""


def choose(pairs: Iterable[Pair], recipe: Recipe, unfit: np.ndarray | None = None) -> tuple[np.ndarray, Facts]:
    """Assign every pair of the training text to a split.

    Pairs with an empty side are dropped. With `deduplicate`, repetitions are dropped too, and training pairs that share
    a sentence with a pair drawn for validation or test, which prevents leakage from training to test.

    Args:
        pairs: Training text.
        recipe: Sizes of the splits, deduplication and seed.
        unfit: (pairs,) bool, pairs that cleaning is known to drop. They are replaced in the draw; all other drawn pairs
            stay.

    Returns:
        (pairs,) int8 with DROPPED or an index of SPLITS, and the number of pairs dropped by reason.

    Raises:
        TranslationError: If there are too few pairs.
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
        numbers = np.arange(1, len(chosen) + 1)  # counted as awk counts lines, over all pairs read
        chosen[(numbers % recipe.valid.every == 0) & (chosen == TRAIN)] = VALID
        if not (chosen == VALID).any():
            raise TranslationError(
                f"valid.every {recipe.valid.every} selects none of {len(chosen)} pairs. Use a smaller number",
                code="too-few-samples",
            )
    free = np.flatnonzero(chosen == TRAIN).tolist()
    if sum(wanted.values()) >= len(free):
        asked = " and ".join(f"{count} pairs for {name}" for name, count in wanted.items()) or "training pairs"
        raise TranslationError(
            f"{asked} requested, but the text has only {len(free)}. Use more text, or request fewer",
            code="too-few-samples",
        )
    for name, numbers in _drawn(free, wanted, recipe.seed, unfit).items():
        chosen[numbers] = SPLITS.index(name)
    if recipe.deduplicate:
        held = chosen > TRAIN
        like = [np.isin(side, np.array(side)[held]) for side in (source, target)]
        facts["overlaps valid or test"] = _drop(chosen, (like[0] | like[1]) & (chosen == TRAIN))
    if not (chosen == TRAIN).any():
        raise TranslationError(f"none of {len(chosen)} pairs is left for train. Use more text", code="too-few-samples")
    return chosen, facts


def drawn_counts(recipe: Recipe) -> dict[str, int]:
    """Return the number of pairs to draw, for the splits that are drawn."""
    return {name: count for name in SPLITS if isinstance(count := getattr(recipe, name, None), int)}


def _drawn(free: list[int], wanted: dict[str, int], seed: int, unfit: np.ndarray | None) -> dict[str, list[int]]:
    """Draw pairs for the splits.

    Args:
        free: Indices of the pairs to draw from.
        wanted: Number of pairs by split.
        seed: Seed of the draw.
        unfit: (pairs,) bool, pairs to replace by others.

    Returns:
        Indices of the drawn pairs by split.
    """
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
                f"{asked} requested, but cleaning leaves only {fit} of {len(free)} pairs. Allow longer sentences "
                "(--max) or larger ratios (--ratio), use more text, or request fewer",
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
