"""All reversible columns of a model: the search for them, and their common policy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import revnets
from revnets.engine.errors import ArgumentError
from revnets.engine.memory_mode import Memory, MemoryPolicy
from tests.support.errors import raises_error
from tests.support.staged_networks import DEPTHS, RewiredNet, StagedNet, images, staged_net

KINDS = pytest.mark.parametrize("kind", [StagedNet, RewiredNet])
COLUMNS = [-(-depth // 2) for depth in DEPTHS]  # of a pair of cells, in the order of the forward


def sequence(depth: int = 4) -> revnets.ReversibleSequence:
    return revnets.ReversibleSequence([nn.Linear(3, 3) for _ in range(depth)])


# ------------------------------------------------------------------------------------------------------ search


def test_sequences_are_found_in_module_order():
    net = staged_net()
    group = revnets.find_columns(net)
    assert isinstance(group, revnets.ColumnsGroup)
    assert list(group) == [net.late, net.early]
    assert len(group) == 2
    assert group[1] is net.early
    assert list(group[1:]) == [net.early]


def test_rewired_sequences_are_found_at_their_blocks():
    net = staged_net(RewiredNet)
    assert not any(isinstance(module, revnets.ReversibleColumns) for module in net.modules())
    group = revnets.find_columns(net)
    assert [columns.flat()[0].function for columns in group] == [net.late[0], net.early[0]]
    assert [len(columns.flat()) for columns in group] == [DEPTHS[1], DEPTHS[0]]


def test_copied_model_has_its_own_sequences():
    net = staged_net(RewiredNet)
    twin = copy.deepcopy(net)
    revnets.find_columns(twin).memory = "store"
    assert set(revnets.find_columns(net).memory) == {"exact"}
    assert revnets.find_columns(twin)[0].flat()[0].function is twin.late[0]


def test_columns_inside_a_cell_are_omitted():
    outer = revnets.ReversibleSequence([nn.Sequential(sequence(), nn.Identity()), *(nn.Identity() for _ in range(3))])
    assert list(revnets.find_columns(nn.Sequential(outer))) == [outer]
    rewired = staged_net(RewiredNet)
    rewired.late[1].append(sequence())
    assert len(revnets.find_columns(rewired)) == 2


def test_shared_sequence_is_listed_once():
    shared = sequence()
    assert list(revnets.find_columns(nn.ModuleList([shared, nn.Sequential(shared), nn.Sequential(shared)]))) == [shared]


def test_model_may_define_its_columns():
    class Chosen(StagedNet):
        @property
        def columns(self) -> revnets.ColumnsGroup:
            return revnets.ColumnsGroup([self.early, self.late])

    net = staged_net(Chosen)
    assert list(revnets.find_columns(net)) == [net.early, net.late]


# ----------------------------------------------------------------------------------------------------------- the policy


@KINDS
def test_modes_of_all_columns(kind):
    group = revnets.find_columns(staged_net(kind))
    late, early = COLUMNS[1], COLUMNS[0]
    assert group.column_count == late + early
    assert group.first_columns == (0, late)
    group.memory = "invert"
    assert group.memory == (Memory.INVERT,) * (late + early)
    group.memory = ["store"] * (late + 1) + ["recompute"] * (early - 1)
    assert group[0].memory == (Memory.STORE,) * late
    assert group[1].memory == (Memory.STORE, *[Memory.RECOMPUTE] * (early - 1))


def test_invalid_modes_change_nothing():
    group = revnets.find_columns(staged_net())
    with raises_error(ArgumentError, code="wrong-length", key="memory", names=[str(group.column_count)]):
        group.memory = ["store"] * (group.column_count - 1)
    with raises_error(ArgumentError, code="unknown-choice", key="memory", names="'exakt'"):
        group.memory = ["store"] * (group.column_count - 1) + ["exakt"]
    assert set(group.memory) == {Memory.EXACT}


def test_stored_cells_are_numbered_continuously():
    group = revnets.find_columns(staged_net())
    first = DEPTHS[1]
    group.stored = [0, first - 1, first, first + 3]
    assert group[0].stored == {0, first - 1}
    assert group[1].stored == {0, 3}
    assert group.stored == {0, first - 1, first, first + 3}
    group.stored = DEPTHS[0] + 2  # counted from the end
    assert group[0].stored == {first - 2, first - 1}
    assert group[1].stored == set(range(DEPTHS[0]))
    with raises_error(ArgumentError, code="out-of-range", key="stored", names=str(group.cell_count)):
        group.stored = [group.cell_count]
    assert [group.flat()[index] for index in (0, first)] == [group[0].flat()[0], group[1].flat()[0]]


def test_group_policy_matches_the_members():
    group = revnets.find_columns(staged_net())
    stored, offloaded = frozenset({1, 6}), frozenset({1, 5})
    policy = MemoryPolicy(("store",) * 3 + ("recompute",) * 4, stored, verify=True, offloaded=offloaded)
    group.policy = policy
    assert group.policy == policy
    assert [columns.policy for columns in group] == [
        MemoryPolicy(("store",) * 3, frozenset({1}), verify=True, offloaded=frozenset({1})),
        MemoryPolicy(("recompute",) * 4, frozenset({1}), verify=True, offloaded=frozenset({0})),
    ]
    with raises_error(ArgumentError, code="out-of-range", key="stored", names="99"):
        group.policy = MemoryPolicy(policy.modes, frozenset({99}))
    assert group.policy == policy


def test_using_restores_the_policies():
    group = revnets.find_columns(staged_net())
    group[0].memory, group[1].verify = "store", True
    before = [columns.policy for columns in group]
    with group.using(modes="invert", stored=3) as inside:
        assert set(inside.modes) == {Memory.INVERT}
        assert inside.stored == {9, 10, 11}
        assert [columns.verify for columns in group] == [False, True]
    assert [columns.policy for columns in group] == before


def test_invalid_policy_changes_nothing():
    group = revnets.find_columns(staged_net())
    before = [columns.policy for columns in group]
    with (
        raises_error(ArgumentError, code="out-of-range", key="stored", names="99"),
        group.using(modes="store", stored=99),
    ):
        pass
    assert [columns.policy for columns in group] == before


def test_budget_is_pending_until_all_modes_are_set():
    group, budget = revnets.find_columns(staged_net()), object()
    group.budget = budget
    assert all(columns.budget is budget for columns in group)
    group[0].memory = "store"
    assert group.budget is budget
    group.memory = "store"
    assert group.budget is None


# ------------------------------------------------------------------------------------------------------------ gradients


@KINDS
@pytest.mark.parametrize("mode", ["recompute", "exact"])
def test_gradients_equal_store(kind, mode):
    net, x = staged_net(kind), images()
    group, found = revnets.find_columns(net), []
    for modes in ("store", mode):
        group.memory = modes
        found.append(torch.autograd.grad(net(x).square().sum(), list(net.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
