"""Cells that keep results of matrix products: the same gradients, and replays without these products."""

from __future__ import annotations

import pickle
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from revnets import MemoryPolicy, ReversibleSequence
from revnets.engine.columns_group import ColumnsGroup
from revnets.engine.errors import ArgumentError, ReplayError
from revnets.memory.tracker import MemoryTracker, OpCounter, kept_bytes
from tests.support.errors import raises_error

CHANNELS, LENGTH, SAMPLES, BLOCKS, PRODUCTS = 12, 7, 3, 5, 4
STATE = 4 * CHANNELS * LENGTH * SAMPLES


class Block(nn.Module):
    """Attention and an MLP: two products, attention, and one more product for the output."""

    dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False)
        self.inner = nn.Conv1d(CHANNELS, 2 * CHANNELS, 3, padding=1)
        self.outer = nn.Linear(2 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(SAMPLES, LENGTH, 3, 2, CHANNELS // 2).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout)
        x = self.inner(x.transpose(1, 2).reshape(SAMPLES, LENGTH, CHANNELS).mT).mT
        return F.dropout(self.outer(F.gelu(F.dropout(x, 0.1))), 0.1)


class Squashed(nn.Module):
    """Changes the result of its first product in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu_(self.first(x)))


def sequence(block: type[nn.Module] = Block) -> ReversibleSequence:
    torch.manual_seed(0)
    return ReversibleSequence([nn.Identity(), nn.Identity(), *(block() for _ in range(BLOCKS))], gain=0.5)


def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(SAMPLES, LENGTH, CHANNELS, requires_grad=True)


def gradients(net: ReversibleSequence) -> tuple[Tensor, ...]:
    given = x()
    return torch.autograd.grad(sum(state.square().sum() for state in net(given)), [given, *net.parameters()])


def equal(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def kept(net: ReversibleSequence) -> int:
    return kept_bytes(net, x())


def matmuls(net: ReversibleSequence) -> int:
    with OpCounter() as counter:
        gradients(net)
    return counter.matmuls


@pytest.mark.parametrize("mode", ["recompute", "exact"])
@pytest.mark.parametrize(
    "numbers", [*combinations(range(PRODUCTS), 1), *combinations(range(PRODUCTS), 3), range(PRODUCTS)]
)
def test_gradients_equal_store(mode, numbers):
    net = sequence()
    net.memory = "store"
    expected = gradients(net)
    net.memory, net.products = mode, dict.fromkeys(range(2, 2 + BLOCKS), numbers)
    assert equal(gradients(net), expected)


@pytest.mark.parametrize("options", [{"verify": True}, {"kept": {3: 4, 4: None}, "stored": [5]}])
def test_gradients_with_other_attributes(options):
    net = sequence()
    with net.using(modes="store"):
        expected = gradients(net)
    with net.using(**options, products={2: [1], 3: [0, 3], 4: [2], 5: [0, 1]}):
        assert equal(gradients(net), expected)


def test_gradients_under_autocast():
    net = sequence()
    with torch.autocast("cpu", torch.bfloat16):
        with net.using(modes="store"):
            expected = gradients(net)
        with net.using(products=dict.fromkeys(range(2, 7), range(PRODUCTS))):
            assert equal(gradients(net), expected)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_is_one_product_or_its_inner_products(backend):
    net = sequence()
    with sdpa_kernel(backend):
        with net.using(modes="store"):
            expected, least = gradients(net), matmuls(net)
        with net.using(products=dict.fromkeys(range(2, 7), range(10))):
            assert equal(gradients(net), expected)
            assert matmuls(net) == least


def test_attention_with_dropout_is_recomputed(monkeypatch):
    monkeypatch.setattr(Block, "dropout", 0.5)
    net = sequence()
    with net.using(modes="store"):
        expected, least = gradients(net), matmuls(net)
    with net.using(products=dict.fromkeys(range(2, 7), range(10))):
        assert equal(gradients(net), expected)
        assert matmuls(net) >= least


def test_kept_products_are_not_recomputed():
    net = sequence()
    counts = []
    for numbers in ([], [0], [0, 1], [0, 1, 2], range(4)):
        net.products = {4: numbers}
        counts.append(matmuls(net))
    assert counts == list(range(counts[0], counts[0] - 5, -1))


def test_bytes_grow_by_the_kept_results():
    net = sequence()
    least = kept(net)
    net.products = {4: [3]}
    assert kept(net) == least + STATE
    net.products = {4: [0, 2]}
    assert kept(net) == least + 5 * STATE


def test_result_changed_in_place_is_recomputed():
    net = sequence(Squashed)
    with net.using(modes="store"):
        expected = gradients(net)
    least = kept(net)
    net.products = {4: [0]}
    assert kept(net) == least
    assert equal(gradients(net), expected)


def test_results_are_reused_in_a_second_backward():
    net = sequence()
    net.products = {cell: [1, 2] for cell in range(2, 7)}
    given = x()
    loss = sum(state.square().sum() for state in net(given))
    (first,) = torch.autograd.grad(loss, given, retain_graph=True)
    with OpCounter() as counter:
        second = torch.autograd.grad(loss, given, retain_graph=True)
    assert torch.equal(first, *second)
    net.products = {}
    loss = sum(state.square().sum() for state in net(given))
    with OpCounter() as without:
        torch.autograd.grad(loss, given)
    assert without.matmuls == counter.matmuls + 2 * BLOCKS


def test_results_are_freed_after_backward():
    net, given = sequence(), x()
    net.products = {cell: range(4) for cell in range(2, 7)}
    with MemoryTracker() as tracker:
        states = net(given)
        assert tracker.live > 20 * STATE
        torch.autograd.grad(sum(state.square().sum() for state in states), given)
        assert tracker.live <= 3 * STATE


def test_other_product_in_the_replay_raises():
    class Fickle(nn.Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls % 2:
                return x @ self.weight
            return torch.bmm(x, self.weight.expand(SAMPLES, CHANNELS, CHANNELS))

    net = sequence(Fickle)
    net.products = {6: [0]}
    with raises_error(ReplayError, code="replay-mismatch", cell="c3.l0"):
        gradients(net)


def test_compiled_cell_keeps_no_results():
    net = sequence()
    with net.using(modes="store"):
        expected = gradients(net)
    least = kept(net)
    net.flat()[4].function.compile(backend="eager")
    net.products = {4: [0, 1, 2, 3]}
    assert kept(net) == least
    assert equal(gradients(net), expected)


def test_products_accept_a_mapping():
    net = sequence()
    net.products = {5: [3, 1, 1], 2: [], 3: range(2)}
    assert net.products == {3: (0, 1), 5: (1, 3)}
    assert net.policy.products == ((3, (0, 1)), (5, (1, 3)))
    with net.using(products={6: [1]}):
        assert net.products == {6: (1,)}
    assert net.truncated(4).products == {3: (0, 1)}
    net.memory = "exact"
    assert net.products == {}


@pytest.mark.parametrize(
    ("products", "code"),
    [
        ({99: [0]}, "out-of-range"),
        ({3: [-1]}, "out-of-range"),
        ({3: 1}, "wrong-type"),
        ({3: ["a"]}, "wrong-type"),
        ([1], "wrong-type"),
    ],
)
def test_invalid_products_raise(products, code):
    net = sequence()
    with raises_error(ArgumentError, code=code, key="products"):
        net.products = products


def test_cells_of_a_group_are_numbered_continuously():
    group = ColumnsGroup([sequence(), sequence()])
    group.products = {3: [1], 9: [0, 2]}
    assert (group[0].products, group[1].products) == ({3: (1,)}, {2: (0, 2)})
    policy = group.policy
    group.memory = "store"
    assert group.products == {}
    group.policy = policy
    assert group.products == {3: (1,), 9: (0, 2)}
    with group.using(products={}):
        assert group.products == {}


def test_policy_pickled_without_the_field_loads():
    policy = MemoryPolicy(("exact",), frozenset({1}), products={3: [0]})
    kind, arguments, state = policy.__reduce_ex__(2)[:3]
    older = kind(*arguments)
    older.__setstate__(state[:6])
    assert older.products == ()
    assert pickle.loads(pickle.dumps(policy)) == policy


class Recurrent(nn.Module):
    """Its kernel changes results of products through views with separate version counters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(CHANNELS, CHANNELS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


def by_data(y: Tensor) -> Tensor:
    y.data.mul_(2)
    return y


def by_a_list(y: Tensor) -> Tensor:
    torch._foreach_mul_([y.detach()], 2)
    return y


def by_parts(y: Tensor) -> Tensor:
    with torch.no_grad():
        torch.unsafe_chunk(y, 2, -1)[0].mul_(2)
    return y


class Doubled(nn.Module):
    """Changes the result of a product without changing its version counter."""

    change = staticmethod(by_data)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.change(self.first(x))))


@pytest.mark.parametrize("change", [by_data, by_a_list, by_parts])
def test_changes_without_a_new_version_are_detected(change, monkeypatch):
    monkeypatch.setattr(Doubled, "change", staticmethod(change))
    net = sequence(Doubled)
    with net.using(modes="store"):
        expected = gradients(net)
    net.products = {cell: [0, 1] for cell in range(2, 7)}
    assert equal(gradients(net), expected)


@pytest.mark.parametrize("mode", ["recompute", "exact"])
def test_recurrent_layer(mode):
    net = sequence(Recurrent)
    with net.using(modes="store"):
        expected = gradients(net)
    net.memory = mode
    net.products = {cell: range(20) for cell in range(2, 7)}
    assert equal(gradients(net), expected)


def test_sparse_tensors_and_products():
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(CHANNELS, CHANNELS)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y + torch.eye(CHANNELS).to_sparse().mul_(2).to_dense().sum(0)

    net = sequence(Sparse)
    with net.using(modes="store"):
        expected = gradients(net)
    net.products = {cell: [0] for cell in range(2, 7)}
    assert equal(gradients(net), expected)
