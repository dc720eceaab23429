"""The policy search agrees with exhaustive search, and every choice fits at each moment of backward."""

from __future__ import annotations

import tracemalloc
from itertools import accumulate, product

from hypothesis import given
from hypothesis import strategies as st

from revnets.memory.policy_search import ALL, LOST, STATE, Option, search

numbers = st.integers(0, 40)
options = st.builds(Option, kept=numbers, work=st.integers(1, 100), room=st.integers(0, 200), replayed=st.none())
nets = st.lists(st.lists(options, min_size=1, max_size=3), min_size=1, max_size=5)


def fits(choice, room: int, unit: float = 0) -> bool:
    """Whether a choice of options fits at every cell and after the last one.

    Args:
        unit: Unit of the search. Each cell may exceed its limit by one unit.
    """
    before = list(accumulate((option.kept for option in choice), initial=0))
    rooms = [*(option.room for option in choice), room]
    return all(kept <= limit + unit * (len(choice) + 1) for kept, limit in zip(before, rooms, strict=True))


@given(nets, st.integers(1, 200))
def test_no_other_choice_that_fits_is_cheaper(cells, room):
    allowed = [choice for choice in product(*cells) if fits(choice, room)]
    found = search(cells, room)
    if found is None:
        assert not allowed
        return
    assert all(option in options for option, options in zip(found, cells, strict=True))
    assert fits(found, room, unit=1)
    best = min((sum(option.work for option in choice) for choice in allowed), default=None)
    assert best is None or sum(option.work for option in found) <= best


@given(nets, st.integers(1, 200))
def test_scale_of_tensor_sizes_does_not_matter(cells, room):
    """One unit of the search is a small part of the memory."""
    scale = 10**7
    large = [[one._replace(kept=one.kept * scale, room=one.room * scale) for one in options] for options in cells]
    found = search(large, room * scale)
    if found is not None:
        assert fits(found, room * scale, unit=room * scale / 16384)
    elif room > 0:
        assert not any(fits(choice, room) for choice in product(*cells))


def test_upper_levels_are_stored_first():
    """All levels cost the same, and each level saves half the bytes of the level below."""
    column = [
        [Option(0, 200, 10**9, LOST), Option(8 >> level, 190, 10**9, STATE), Option(80 >> level, 100, 10**9, ALL)]
        for level in range(4)
    ]
    found = search(column * 5, 300)
    assert found is not None
    stored = [index % 4 for index, option in enumerate(found) if option.replayed == ALL]
    assert stored.count(3) == 5
    assert stored.count(0) == 0


def test_later_cells_take_no_memory_from_earlier_ones():
    """The first cell fits only by itself, and the last one only if nothing is kept before it."""
    small, large = Option(0, 9, 0, LOST), Option(50, 1, 0, ALL)
    assert search([[small, large]] * 2, 50) == [small, large]


def test_nothing_fits():
    assert search([[Option(50, 1, 0, ALL)], [Option(5, 1, 30, ALL)]], 100) is None
    assert search([[Option(50, 1, 0, ALL)]], 40) is None


def test_cells_with_large_gradients_need_no_long_tables():
    cells = [[Option(-10_000_019, 7, 10**9, LOST), Option(-10_000_000, 3, 10**9, STATE)]]
    tracemalloc.start()
    found = search(cells, 13)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found == [cells[0][1]]
    assert peak < 10_000_000
