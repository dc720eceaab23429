"""The memory policy of columns: immutable, set through attributes, restored, copied and pickled."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from revnets import Memory, MemoryPolicy, ReversibleColumns
from revnets.config.memory_budget import BudgetSpec
from revnets.engine.errors import ArgumentError
from tests.support.errors import raises_error
from tests.support.networks import token_net

BUDGET = BudgetSpec(budget="24GiB", optimizer="sgd")


def columns(count: int = 3) -> ReversibleColumns:
    torch.manual_seed(0)
    return token_net(columns=count)


def with_policy() -> tuple[ReversibleColumns, MemoryPolicy]:
    """Return columns whose policy differs from the default in every field."""
    net = columns()
    modes = Memory.RECOMPUTE, Memory.EXACT, Memory.STORE
    policy = MemoryPolicy(modes, frozenset({1, 4}), True, BUDGET, offloaded=frozenset({0, 4}))
    net.policy = policy
    return net, policy


def test_attributes_match_the_policy() -> None:
    net, policy = with_policy()
    assert (net.memory, net.stored, net.verify, net.budget) == (policy.modes, policy.stored, policy.verify, BUDGET)
    assert net.offloaded == policy.offloaded


def test_policy_is_immutable() -> None:
    net, _ = with_policy()
    with pytest.raises(FrozenInstanceError):
        net.policy.verify = False  # type: ignore[misc]


def test_fields_are_converted_to_their_types() -> None:
    policy = MemoryPolicy(["exact", "store"], [3, 1, 3])  # type: ignore[arg-type]
    assert policy == MemoryPolicy((Memory.EXACT, Memory.STORE), frozenset({1, 3}))
    assert all(type(mode) is Memory for mode in policy.modes)
    with raises_error(ArgumentError, code="unknown-choice", key="memory", names="'most'"):
        MemoryPolicy(("most",))  # type: ignore[arg-type]


def test_setting_memory_resets_the_budget_and_offloaded_cells() -> None:
    net, policy = with_policy()
    net.memory = "invert"
    assert net.policy == replace(policy, modes=(Memory.INVERT,) * 3, budget=None, offloaded=frozenset())


def test_setting_other_attributes_changes_nothing_else() -> None:
    net, policy = with_policy()
    net.stored, net.verify = 2, False
    total = len(net.graph.nodes)
    assert net.policy == replace(policy, stored=frozenset({total - 2, total - 1}), verify=False)
    net.budget = None
    assert net.policy == replace(policy, stored=net.stored, verify=False, budget=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("offloaded", 3),
        ("offloaded", "01"),
        ("offloaded", [0.5]),
        ("stored", None),
        ("kept", 3),
        ("kept", {"3": None}),
        ("kept", {3: "2"}),
    ],
)
def test_values_of_the_wrong_type_raise(name, value) -> None:
    net, policy = with_policy()
    with raises_error(ArgumentError, code="wrong-type", key=name, names=name):
        setattr(net, name, value)
    assert net.policy == policy


@pytest.mark.parametrize("changes", [{"kept": {1, 2}}, {"kept": 3}, {"stored": 3}, {"offloaded": 3}])
def test_fields_of_the_wrong_type_raise(changes) -> None:
    (name,) = changes
    with raises_error(ArgumentError, code="wrong-type", key=name, names=name):
        MemoryPolicy((Memory.EXACT,), **changes)


@pytest.mark.parametrize(
    ("changes", "code", "key", "names"),
    [
        ({"modes": (Memory.EXACT,) * 2}, "wrong-length", "memory", ["2", "3 columns"]),
        ({"stored": frozenset({99})}, "out-of-range", "stored", "cell 99"),
        ({"offloaded": frozenset({3, -1})}, "out-of-range", "offloaded", "cell -1"),
    ],
)
def test_policy_of_other_columns_raises(changes, code, key, names) -> None:
    net, policy = with_policy()
    with raises_error(ArgumentError, code=code, key=key, names=names):
        net.policy = replace(policy, **changes)
    assert net.policy is policy


def test_using_restores_the_whole_policy() -> None:
    net, policy = with_policy()
    with net.using(modes="store", stored=0, verify=False, offloaded=()) as inside:
        assert inside == net.policy == MemoryPolicy((Memory.STORE,) * 3)
        net.memory = "invert"
    assert net.policy is policy


def test_using_restores_after_an_exception() -> None:
    net, policy = with_policy()
    with pytest.raises(KeyError), net.using(modes="store"):
        raise KeyError
    with (
        raises_error(ArgumentError, code="out-of-range", key="stored", names="99"),
        net.using(modes="store", stored=[99]),
    ):
        pass
    assert net.policy is policy


def test_using_accepts_a_policy() -> None:
    net, policy = with_policy()
    other = replace(policy, budget=None, verify=False)
    with net.using(other, stored=[2]):
        assert net.policy == replace(other, stored=frozenset({2}))
    assert net.policy is policy


def saved(net: ReversibleColumns) -> ReversibleColumns:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), saved])
def test_copies_have_an_independent_policy(copied) -> None:
    net, policy = with_policy()
    other = copied(net)
    assert other.policy == policy
    other.memory = "store"
    assert net.policy is policy


def test_pickles_with_four_attributes_load() -> None:
    net, policy = with_policy()
    state = {name: value for name, value in vars(net).items() if name != "_policy"}
    state |= {"_memory": policy.modes, "_stored": policy.stored, "verify": True, "budget": BUDGET}
    other = ReversibleColumns.__new__(ReversibleColumns)
    other.__setstate__(state)
    assert other.policy == replace(policy, offloaded=frozenset())
    assert not {"_memory", "_stored", "verify", "budget"} & vars(other).keys()


def test_policy_pickled_without_offloaded_cells_loads() -> None:
    _, policy = with_policy()
    other = MemoryPolicy.__new__(MemoryPolicy)
    other.__setstate__(policy.__getstate__()[:5])  # type: ignore[attr-defined]
    assert other == replace(policy, offloaded=frozenset())
