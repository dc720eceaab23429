"""Plans and budgets of a model with several reversible sequences: one choice for the cells and columns of all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import revnets
from revnets.analysis.memory_scaling import step_bytes
from revnets.memory.saved_tensors import costs_of_cells
from revnets.memory.simulation import typical_gamma
from revnets.memory.tracker import OpCounter
from tests.support.simulated_steps import simulated_once
from tests.support.staged_networks import DEPTHS, DIMS, IMAGES, RewiredNet, StagedNet, images, staged_net

KINDS = pytest.mark.parametrize("kind", [StagedNet, RewiredNet])


@pytest.fixture(scope="module", autouse=True)
def _simulated_once() -> Iterator[None]:
    with simulated_once():
        yield


def between(kind: type[StagedNet], share: float) -> int:
    """Return a budget between the lowest and the highest peak of the model."""
    modes = {row.mode: row.peak for row in plan(kind).modes}
    return int(modes["exact"] + share * (modes["store"] - modes["exact"]))


def plan(kind: type[StagedNet], **request) -> revnets.Plan:
    return revnets.plan(staged_net(kind), images(), optimizer="none", **request)


@KINDS
def test_predicted_memory_is_what_a_step_takes(kind):
    net = staged_net(kind)
    for row in plan(kind).modes:
        revnets.find_columns(net).memory = row.mode
        parameters, kept, peak = step_bytes(net, images())
        net.zero_grad()
        assert row.parameters == parameters
        # The length of lost bits depends on values, and coding needs up to 128 KiB, which is a lot for a small model.
        kept_within, peak_within = (0.01, 0.05) if row.mode == "exact" else (0.003, 0.003)
        assert row.kept == pytest.approx(kept, rel=kept_within)
        assert row.peak == pytest.approx(peak, rel=peak_within)


@KINDS
def test_budget_is_respected_with_cells_and_columns_of_both_sequences(kind):
    budget, net = between(kind, 0.5), staged_net(kind)
    found = plan(kind, modes=(), budget=budget)
    found.apply(net)
    group, late = revnets.find_columns(net), DEPTHS[1]
    assert found.chosen is not None
    assert group.stored == set(found.chosen.stored)
    assert [str(mode) for mode in group.memory] == found.chosen.memory(group.column_count)
    assert group[0].stored == {index for index in found.chosen.stored if index < late}
    assert all(columns.stored or columns.products for columns in group)
    assert group.products == dict(found.chosen.products)
    assert group.kept == dict(found.chosen.kept_cells)
    assert any(columns.kept or "recompute" in columns.memory for columns in group)
    assert not set(group.first_columns) & set(found.chosen.recomputed)  # no states before them
    _, kept, peak = step_bytes(net, images())
    assert 0.85 * budget < peak <= budget
    assert kept == pytest.approx(found.chosen.kept, rel=0.003)


@KINDS
def test_pending_budget_is_planned_for_all_sequences(kind):
    budget, net = between(kind, 0.5), staged_net(kind)
    revnets.keep_budget(net, revnets.config.memory_budget.BudgetSpec(budget=budget, optimizer="none"))
    group = revnets.find_columns(net)
    assert group.budget is not None
    net(images())
    expected = plan(kind, modes=(), budget=budget).chosen
    assert expected is not None
    assert net.memory_plan.chosen == expected
    assert (group.budget, group.stored) == (None, set(expected.stored))
    with pytest.warns(UserWarning, match="may exceed the budget"):
        net(torch.randn(5, 3, 29, 23))


def last_product(sequence: int) -> int:
    """FLOPs of the last convolution of a block, which the first two cells of a sequence do not recompute."""
    height, width = ((29, 23), (14, 11))[sequence]
    return 2 * IMAGES[0] * height * width * DIMS[sequence] ** 2


@KINDS
def test_costs_have_cell_indices_in_the_order_of_forward(kind):
    """The sequence that runs first is the last one in the list."""
    net = staged_net(kind)
    costs, (late, early) = costs_of_cells(net, (images(),)), DEPTHS[::-1]
    assert list(costs) == [*range(late, late + early), *range(late)]
    weights = [sum(parameter.nbytes for parameter in cell.parameters()) for cell in revnets.find_columns(net).flat()]
    assert {index: cost.gradients for index, cost in costs.items()} == dict(enumerate(weights))
    modes = {row.mode: row for row in plan(kind, modes=("store", "invert")).modes}
    replays = modes["invert"].flops - modes["store"].flops
    assert sum(cost.flops for cost in costs.values()) == replays + 2 * sum(
        last_product(sequence) for sequence in (0, 1)
    )


def test_columns_that_run_twice_have_the_costs_of_both_runs():
    class Twice(StagedNet):
        def forward(self, images):
            return super().forward(images) + super().forward(images.flip(-1))

    once, twice = (costs_of_cells(staged_net(kind), (images(),)) for kind in (StagedNet, Twice))
    assert list(twice) == list(once)
    assert all(twice[index].flops == 2 * once[index].flops for index in once)
    assert all(twice[index].gradients == once[index].gradients for index in once)


def test_stored_cell_is_not_replayed_in_any_sequence():
    net, spared = staged_net(), []
    group, costs = revnets.find_columns(net), costs_of_cells(staged_net(), (images(),))

    def work(stored: tuple[int, ...]) -> int:
        group.stored = stored
        with OpCounter() as counter:
            torch.autograd.grad(net(images()).sum(), list(net.parameters()))
        return counter.flops

    # The last cell of one sequence, and the first of the other one, whose replay ends early.
    for index, left_out in ((DEPTHS[1] - 1, 0), (DEPTHS[1], last_product(0))):
        spared.append((work(()) - work((index,)), costs[index].flops - left_out))
    assert all(found == expected for found, expected in spared)


def test_gains_of_sequences_outside_submodules_are_found():
    net = staged_net(RewiredNet)
    for columns in revnets.find_columns(net):
        for cell in columns.flat():
            if cell.gain is not None:
                cell.gain = revnets.FixedGain(0.3)
    assert typical_gamma(net) == 0.3
