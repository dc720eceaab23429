"""Cells that keep the state they replace and some saved tensors: same gradients, fewer products."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnets import Memory, MemoryPolicy, ReversibleSequence
from revnets.engine.columns_group import ColumnsGroup
from revnets.engine.errors import ArgumentError
from revnets.memory.tracker import OpCounter, kept_bytes
from tests.support.errors import raises_error

CHANNELS, SAMPLES, BLOCKS = 13, 5, 7
STATE = 4 * CHANNELS * SAMPLES


class Block(nn.Module):
    """Saves mean and standard deviation of the norm and, in order, inputs and weights of three products."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.products = nn.ModuleList([nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for product in self.products:
            x = F.dropout(F.gelu(product(x)), 0.1)
        return product(x)


def sequence() -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([nn.Identity(), nn.Identity(), *(Block() for _ in range(BLOCKS))], gain=0.5)


def gradients(net: ReversibleSequence) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    x = torch.randn(SAMPLES, CHANNELS, requires_grad=True)
    return torch.autograd.grad(sum(state.square().sum() for state in net(x)), [x, *net.parameters()])


def products(net: ReversibleSequence) -> int:
    with OpCounter() as counter:
        gradients(net)
    return counter.matmuls


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("kept", [[2, 3, 5], {4: 0, 5: 2, 6: 100, 7: None, 8: 5, 2: 3}])
def test_gradients_equal_store(kept, verify):
    net = sequence()
    net.memory = "store"
    expected = gradients(net)
    net.memory, net.stored, net.verify = "exact", [5], verify
    net.kept = kept
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients(net), expected, strict=True))


def test_a_second_backward_replays_what_is_not_kept():
    net = sequence()
    net.kept = {4: 2, 6: 0, 8: None}
    x = torch.randn(SAMPLES, CHANNELS, requires_grad=True)
    loss = sum(state.square().sum() for state in net(x))
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(first, *torch.autograd.grad(loss, x))


def test_kept_state_saves_the_last_product():
    net = sequence()
    rebuilt = products(net)
    net.kept = [5]
    assert products(net) == rebuilt - 1


def test_fewer_replayed_tensors_need_fewer_products():
    net, counts = sequence(), []
    for replayed in range(20):
        net.kept = {5: replayed}
        counts.append(products(net))
    net.kept, net.stored = {}, [5]
    assert counts == sorted(counts)
    assert counts[0] == products(net)
    assert counts[-1] - counts[0] == 3  # of four; only the state needs the last one
    assert set(counts) == set(range(counts[0], counts[0] + 4))


def test_bytes_grow_by_the_state_and_the_kept_tensors():
    net, x = sequence(), torch.randn(SAMPLES, CHANNELS)

    def kept(replayed: int | None) -> int:
        net.kept = {5: replayed}
        return kept_bytes(net, x)

    net.memory = "recompute"
    state_alone = kept(None)
    with net.using(stored=[5]):
        everything = kept_bytes(net, x)
    assert kept(1000) == state_alone
    assert state_alone < kept(9) < kept(6) <= kept(0) <= everything
    assert kept(0) > state_alone + 6 * STATE  # inputs of the products and of the activations
    net.memory = "exact"
    lost = kept_bytes(net, x)
    assert lost < kept(None) <= lost + STATE


def test_kept_accepts_indices_or_a_mapping():
    net = sequence()
    net.kept = {5: 3, 2: None}
    assert net.policy.kept == ((2, None), (5, 3))
    net.kept = [4, 3]
    assert net.kept == {3: None, 4: None}
    with net.using(kept={6: 1}):
        assert net.kept == {6: 1}
    assert net.truncated(4).kept == {3: None}
    net.memory = "exact"
    assert net.kept == {}


@pytest.mark.parametrize(("kept", "names"), [([99], "cell 99"), ([10**5000], "16610 bits"), ({3: -1}, "-1")])
def test_invalid_kept_raises(kept, names):
    net = sequence()
    with raises_error(ArgumentError, code="out-of-range", key="kept", names=names):
        net.kept = kept


def test_cells_of_a_group_are_numbered_continuously():
    group = ColumnsGroup([sequence(), sequence()])
    group.kept = {3: None, 9: 2, 17: 0}
    assert (group[0].kept, group[1].kept) == ({3: None}, {0: 2, 8: 0})
    policy = group.policy
    group.memory = "store"
    assert group.kept == {}
    group.policy = policy
    assert group.kept == {3: None, 9: 2, 17: 0}


def test_policy_pickled_without_the_field_loads():
    policy = MemoryPolicy((Memory.EXACT,), frozenset({1}), True)
    kind, arguments, state = policy.__reduce_ex__(2)[:3]
    older = kind(*arguments)
    older.__setstate__(state[:4])
    assert older == policy == pickle.loads(pickle.dumps(policy))
