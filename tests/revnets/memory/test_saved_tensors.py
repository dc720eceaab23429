"""Costs of saving and replaying cells agree with real passes."""

from __future__ import annotations

import torch

import revnets
from revnets.memory.saved_tensors import costs_of_cells
from revnets.memory.simulation import simulate

NET = {
    "columns": 5,
    "stem": {"type": "patchify", "patch": 2},
    "levels": [{"dim": 7, "depth": 1, "block": "convnext"}, {"dim": 11, "depth": 2, "block": "convnext"}],
    "head": {"type": "classifier", "num_classes": 3},
}
IMAGES = (3, 3, 22, 26)


def test_costs_agree_with_plain_autograd():
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


def test_saved_tensors_agree_with_the_tape_in_order():
    """If the last tensors of a cell are kept, a step saves their bytes in addition and recomputes less."""
    net, images = revnets.build(NET), (torch.randn(IMAGES),)
    index, net.columns.kept = 6, [6]
    saved = costs_of_cells(net, images)[index].saved
    state_alone = simulate(net, images)
    assert len(saved) > 10
    for replayed in (3, 9, len(saved) - 3):
        net.columns.kept = {index: replayed}
        found = simulate(net, images)
        assert found.kept - state_alone.kept == sum(tensor.nbytes for tensor in saved[replayed:])
        assert found.work < state_alone.work or not any(tensor.nbytes for tensor in saved[replayed:])
