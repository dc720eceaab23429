"""Cells that are worth storing: every moment of backward keeps its room, and costs are those of real passes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import revnets
from revnets.memory.simulation import simulate
from revnets.memory.store_selection import WORKING, Cost, costs_of_cells, order

NET = {
    "columns": 5,
    "stem": {"type": "patchify", "patch": 2},
    "levels": [{"dim": 7, "depth": 1, "block": "convnext"}, {"dim": 11, "depth": 2, "block": "convnext"}],
    "head": {"type": "classifier", "num_classes": 3},
}
IMAGES = (3, 3, 22, 26)

numbers = st.integers(1, 50)
cells = st.lists(st.builds(Cost, kept=numbers, flops=numbers, gradients=numbers), min_size=1, max_size=20)


def peak(costs, stored) -> float:
    """The most that is held at once, cell by cell of backward."""
    return max(
        sum(costs[t].kept for t in stored if t < u)
        + sum(other.gradients for other in costs[u + 1 :])
        + WORKING * cost.kept
        for u, cost in enumerate(costs)
    )


@given(cells)
def test_whatever_does_not_raise_the_peak_comes_first(costs):
    cells = order(costs)
    assert sorted(cells) == list(range(len(costs)))
    for count in range(len(cells)):
        before, after = peak(costs, cells[:count]), peak(costs, cells[: count + 1])
        if after > before:
            assert all(peak(costs, [*cells[:count], t]) > before for t in cells[count:])


@given(cells)
def test_among_those_that_raise_it_work_for_a_byte_counts(costs):
    cells = order(costs)
    for count, chosen in enumerate(cells):
        before = peak(costs, cells[:count])
        growth = {t: peak(costs, [*cells[:count], t]) - before for t in cells[count:]}
        if growth[chosen] > 0:
            worth = {t: costs[t].flops / max(growth[t], 1) for t in growth}
            assert worth[chosen] == max(worth.values())
        else:
            free = [t for t in growth if growth[t] == 0]
            assert costs[chosen].flops / costs[chosen].kept == max(costs[t].flops / costs[t].kept for t in free)


def test_the_tops_of_columns_come_before_their_bottoms():
    column = [Cost(kept=80 >> level, flops=100, gradients=4**level) for level in range(4)]
    cells = order(column * 5)
    assert sum(t % 4 == 3 for t in cells[:8]) >= 4
    assert sum(t % 4 == 0 for t in cells[-5:]) >= 4


def test_costs_are_those_of_plain_autograd():
    with torch.device("meta"):
        net = revnets.build(NET)
    inputs = (torch.empty(IMAGES, device="meta"),)
    costs = list(costs_of_cells(net, inputs).values())
    net.columns.memory = "store"
    store = simulate(net, inputs)
    net.columns.memory = "invert"
    replayed = simulate(net, inputs)
    assert sum(cost.flops for cost in costs) == replayed.flops - store.flops
    assert 0.9 * store.kept < sum(cost.kept for cost in costs) <= store.kept
    assert [cost.gradients for cost in costs] == [
        sum(parameter.nbytes for parameter in cell.parameters()) for cell in net.columns.flat()
    ]
    assert len({cost.flops for cost in costs[2::2]}) == len({cost.flops for cost in costs[3::2]}) == 1


def test_frozen_cells_have_no_gradients():
    net = revnets.build(NET)
    net.columns.cells[:-1].requires_grad_(False)
    costs = list(costs_of_cells(net, (torch.randn(IMAGES),)).values())
    assert [cost.gradients > 0 for cost in costs] == [False] * 8 + [True] * 2
