"""Offloaded cells: what they keep is in host memory, and gradients equal those of `store` bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from revnets import ReplayError, ReversibleColumns, ReversibleSequence, find_columns, make_reversible
from revnets.engine import lost_bits
from revnets.engine.cell import Cell, FixedGain
from revnets.engine.graph import wire
from revnets.engine.offload import hosted_tensors, transfers
from revnets.engine.offload.host_store import LEAST
from revnets.memory.simulation import simulate, total
from revnets.memory.tracker import MemoryTracker
from tests.support.errors import raises_error
from tests.support.gradients import Result, assert_same, loss_of, step
from tests.support.networks import BLOCKS, image_net, stem_of, token_net

BATCH = 211  # so that lost bits exceed LEAST as well
MODES = ("store", "recompute", "exact")
ONE, OTHER = ("mlp", "attention", "dropout"), ("conv", "batchnorm", "inplace")


def offloaded(net: ReversibleColumns, stored: Sequence[int] = ()) -> ReversibleColumns:
    net.stored, net.offloaded = stored, range(len(net.graph.nodes))
    return net


def bytes_of_a_step(net: ReversibleColumns, x: Tensor) -> tuple[int, int, int, int]:
    """Return bytes on the device and in host memory, after the forward pass and at their peaks."""
    with MemoryTracker() as tracker:
        tracker.register(net)
        static = tracker.live
        loss = total(net(x))
        kept, host = tracker.live - static, tracker.host
        loss.backward()
    for leaf in (*net.parameters(), x):
        leaf.grad = None
    assert tracker.host == 0
    return kept, tracker.peak, host, tracker.host_peak


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("stored", [(), (3, 4, 10)])
@pytest.mark.parametrize("blocks", [ONE, OTHER])
def test_gradients_equal_store(blocks, stored, memory):
    net = token_net(columns=4, blocks=blocks)
    x = stem_of(net, BATCH)
    expected = step(net, x, "store")
    assert_same(step(offloaded(net, stored), x, memory), expected)


def test_kept_states_and_kept_tensors():
    net = token_net(columns=4, blocks=ONE)
    x = stem_of(net, BATCH)
    expected = step(net, x, "store")
    net.memory, net.kept = "exact", {3: None, 5: 2, 7: 0, 10: 4}
    kept, peak, _, _ = bytes_of_a_step(net, x)
    less, lower, host, _ = bytes_of_a_step(offloaded(net, [8]), x)
    assert lower < peak
    assert less < kept
    assert host > 0
    assert_same(step(net, x), expected)


@pytest.mark.parametrize("memory", MODES)
def test_autocast_and_other_memory_layouts(memory):
    net = image_net()
    x = stem_of(net, 17)
    expected = step(net, x, "store", autocast=torch.bfloat16)
    assert_same(step(offloaded(net, [4]), x, memory, autocast=torch.bfloat16), expected)


def twice(net: ReversibleColumns, x: Tensor) -> list[Tensor]:
    """Compute a gradient of a gradient, and run another backward through the same graph."""
    loss = loss_of([level.tanh() for level in net(x)])
    (grad,) = torch.autograd.grad(loss, x, create_graph=True, retain_graph=True)
    grad.square().sum().backward(retain_graph=True)
    loss.backward()
    return [grad.detach()]


def batched(net: ReversibleColumns, x: Tensor) -> list[Tensor]:
    """Compute several gradients in one backward with vmap."""
    levels = net(x)
    top = levels[-1].sum((0, 1))
    rows = torch.autograd.grad(top, x, torch.eye(len(top)), is_grads_batched=True, retain_graph=True)
    loss_of(levels).backward()
    return list(rows)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("train", [twice, batched])
def test_double_and_batched_backward(train, memory):
    net = token_net(columns=3, blocks=("mlp", "conv"))
    x = stem_of(net, BATCH)
    expected = step(net, x, "store", train)
    assert_same(step(offloaded(net, [1, 5]), x, memory, train), expected)


@pytest.mark.parametrize(("memory", "stored"), [("store", ()), ("recompute", ()), ("exact", ()), ("exact", (4, 7, 8))])
def test_device_memory_shrinks_by_the_host_memory(memory, stored):
    net = token_net(columns=5, memory=memory)
    x = stem_of(net, BATCH, grad=False)
    net.stored = stored
    kept, peak, host, _ = bytes_of_a_step(net, x)
    assert host == 0
    less, lower, host, highest = bytes_of_a_step(offloaded(net, stored), x)
    assert host > LEAST
    assert highest == host  # it only shrinks in backward
    assert kept - host <= less < kept  # each cell copies the states it saves
    assert lower < peak or memory == "exact"  # which keeps few lost bits


@pytest.mark.parametrize("memory", MODES)
def test_fake_tensors_predict_the_memory(memory):
    net = offloaded(token_net(columns=4, memory=memory), [4])
    x = stem_of(net, BATCH, grad=False)
    kept, peak, host, _ = bytes_of_a_step(net, x)
    predicted = simulate(net, (x,))
    near = partial(pytest.approx, rel=0.06 if memory == "exact" else 0)  # small tensors of lost bits stay on the device
    assert predicted.kept == near(kept)
    assert predicted.peak == near(peak)
    assert predicted.host == near(host)


@pytest.mark.parametrize("memory", MODES)
def test_hooks_around_the_model_receive_only_what_plain_autograd_saves(memory):
    """Such hooks are `save_on_cpu` and the activation offloading of other libraries."""
    seen = []
    net = token_net(columns=3, memory=memory)
    with saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        levels = net(stem_of(net))
    assert (len(seen) == 0) == (memory != "store")
    del levels


def test_deleted_graph_frees_everything():
    net = offloaded(token_net(memory="store"))
    x = stem_of(net, BATCH)
    with MemoryTracker() as tracker:
        levels = net(x)
        assert tracker.host > 0
        del levels
    assert (tracker.live, tracker.host) == (0, 0)


class Masked(nn.Module):
    """Its backward needs its input and a mask, which all cells share."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.register_buffer("table", torch.rand(BATCH, dim))

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        return self.linear(x).sin() * self.table * mask


def test_resident_tensors_stay_on_the_device():
    dim = 31
    cells = [Cell(Masked(dim), FixedGain() if t >= 2 else None) for t in range(6)]
    net = offloaded(ReversibleColumns(wire(6, 2, [[1]] * 2), cells, "store"))
    x, mask = torch.randn(BATCH, dim), torch.rand(BATCH, dim)
    with MemoryTracker() as tracker:
        levels = net(x, mask=mask)
    assert tracker.host == (5 + 6) * x.nbytes  # inputs of all cells but the first, and the operands of the sine
    del levels


@contextmanager
def fetches() -> Iterator[list[tuple[int, bool]]]:
    """For each use of a hosted storage, yield its bytes and whether its copy had been started before."""
    used: list[tuple[int, bool]] = []
    original = hosted_tensors.HostedStorage.bytes_on_device

    def bytes_on_device(storage: Any) -> Tensor:
        used.append((storage.buffer.nbytes, storage.fetched is not None))
        return original(storage)

    hosted_tensors.HostedStorage.bytes_on_device = bytes_on_device
    try:
        yield used
    finally:
        hosted_tensors.HostedStorage.bytes_on_device = original


@pytest.mark.parametrize(("memory", "stored"), [("store", ()), ("exact", (1, 2, 7))])
def test_copies_start_before_their_cell_is_reached(memory, stored):
    net = offloaded(token_net(columns=3, memory=memory), stored)
    with fetches() as used:
        loss_of(net(stem_of(net, BATCH))).backward()
    assert len(used) > 9
    assert all(started for _, started in used)


def test_at_most_two_cells_are_on_the_device():
    """In a chain of equal cells, host memory grows with their number, but the device's peak does not."""
    found = []
    for count in (5, 17):
        net = ReversibleSequence([nn.Sequential(nn.Linear(13, 13), nn.Tanh()) for _ in range(count)], memory="store")
        x = torch.randn(BATCH, 13)
        _, peak, host, _ = bytes_of_a_step(offloaded(net), x)
        found.append((peak - 2 * sum(p.nbytes for p in net.parameters()), host))
    (short, little), (long, much) = found
    assert long - short < 17 * 64  # the losses' scalars
    assert much > 3 * little


@pytest.mark.parametrize("is_leaf", [True, False])
def test_stem_returned_by_cells_keeps_no_hooks(is_leaf):
    cells = [nn.Identity(), nn.Identity(), *(nn.Linear(13, 13) for _ in range(3))]
    net = offloaded(ReversibleSequence(cells, m=2, memory="store"))
    stem = nn.Parameter(torch.randn(BATCH, 13))
    x = stem if is_leaf else stem * 2
    for _ in range(3):
        loss_of(net(x)).backward(retain_graph=True)
    assert not x._backward_hooks


class LateCopies(TorchDispatchMode):
    """The copy stream of a device that copies only when another stream waits for it."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.done = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self.pairs.append(args[:2])
        return args[0].fill_(99)  # the content before the copy

    def wait_stream(self, _: Any) -> None:
        """Do nothing: the computation is always finished."""

    def record_event(self) -> int:
        return self.done + len(self.pairs)

    def wait_event(self, number: int) -> None:
        while self.done < number:
            destination, source = self.pairs.pop(0)
            destination.copy_(source)
            self.done += 1


@pytest.fixture
def late_copies(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    copies = LateCopies()
    backend = SimpleNamespace(current_stream=lambda _: copies, stream=lambda stream: stream)
    monkeypatch.setattr(torch, "get_device_module", lambda _: backend)
    monkeypatch.setattr(transfers, "has_streams", lambda _: True)
    monkeypatch.setattr(transfers, "_copying_stream", lambda _: copies)
    return copies


@pytest.mark.parametrize(("memory", "stored"), [("store", ()), ("recompute", (3,)), ("exact", (2, 7))])
def test_nothing_is_read_before_its_copy_finishes(late_copies, memory, stored):
    net = token_net(columns=3, blocks=("mlp", "conv"))
    x = stem_of(net, BATCH)
    expected = step(net, x, "store")
    assert_same(step(offloaded(net, stored), x, memory), expected)
    assert late_copies.done > 10
    assert not late_copies.pairs


def test_missing_waits_change_the_gradients(late_copies, monkeypatch):
    monkeypatch.setattr(LateCopies, "wait_event", lambda *_: None)
    net = token_net(columns=3)
    x = stem_of(net, BATCH)
    expected = step(net, x, "store")
    with pytest.raises(AssertionError):
        assert_same(step(offloaded(net), x, "recompute"), expected)


def test_lost_bits_compacted_later(monkeypatch):
    """As on a GPU, where their lengths arrive late."""
    net = token_net(columns=4)
    x = stem_of(net, BATCH)
    expected = step(net, x, "store")
    monkeypatch.setattr(lost_bits, "encode", partial(lost_bits.encode, defer=True))
    assert_same(step(offloaded(net), x, "exact"), expected)
    with MemoryTracker() as tracker:
        levels = net(x)
    assert tracker.host > LEAST
    del levels


class Changing(nn.Module):
    """Changes a saved tensor of a product in place."""

    def __init__(self, dim: int):
        super().__init__()
        self.first, self.second = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).detach().requires_grad_()
        z = self.second(y)
        with torch.no_grad():
            y.mul_(2)
        return z


def test_saved_tensor_changed_in_place_raises():
    net = ReversibleSequence([nn.Linear(7, 7), nn.Linear(7, 7), Changing(7)], memory="store")
    net.offloaded = [2]
    loss = loss_of(net(torch.randn(BATCH, 7)))
    with raises_error(ReplayError, code="changed-in-place"):
        loss.backward()


def test_weights_changed_before_backward_raise():
    net = offloaded(token_net(memory="store"))
    loss = loss_of(net(stem_of(net, BATCH)))
    with torch.no_grad():
        next(net.parameters()).mul_(2)
    with raises_error(ReplayError, code="changed-in-place"):
        loss.backward()


def test_blocks_of_a_rewired_network():
    grads = []
    for cells in ((), range(1, 12)):
        torch.manual_seed(5)
        stages = [nn.Sequential(*(Residual(13) for _ in range(5))) for _ in range(2)]
        model = make_reversible(nn.Sequential(*stages), 0.5, blocks=["0", "1"])
        columns = find_columns(model)
        columns.stored, columns.offloaded = [3, 8], cells
        assert columns.offloaded == set(cells)
        with MemoryTracker() as tracker:
            loss = model(torch.linspace(-1, 1, BATCH * 13).view(BATCH, 13)).square().sum()
        assert (tracker.host > 0) == bool(cells)
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


class Residual(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.block = BLOCKS["mlp"](dim)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("memory", MODES)
def test_on_a_gpu(memory):
    """Same results from pinned memory; the allocator of the device confirms the saved memory."""
    net = token_net(columns=7, blocks=("mlp", "conv"), memory=memory).cuda()
    x = torch.randn(4 * BATCH, 4, 5, device="cuda")

    def run() -> tuple[Result, int]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        levels = net(x)
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        loss_of(level.cpu() for level in levels).backward()
        grads = {name: parameter.grad for name, parameter in net.named_parameters()}
        net.zero_grad()
        return Result([level.detach() for level in levels], grads, {}), kept

    with torch.backends.cudnn.flags(deterministic=True):
        expected, kept = run()
        found, less = (offloaded(net, [4]), run())[1]
    assert_same(found, expected)
    assert less < kept or memory == "exact"
