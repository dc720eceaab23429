"""Cost of a pass, as exact counts: matrix products, bytes saved for backward, and bytes alive afterwards."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from revnets import ReplayError, ReversibleColumns, ReversibleSequence
from tests.support.counters import Kept, Matmuls
from tests.support.gradients import loss_of, tapes
from tests.support.networks import image_net, stem_of, token_net

TAPED = ("recompute", "invert", "exact")

pytestmark = pytest.mark.filterwarnings("ignore::revnets.DriftWarning")  # gradients are not checked


# --------------------------------------------------------------------------------------- matrix products


def matmuls(net: ReversibleColumns, memory: str, taps: Sequence[int] | None = None) -> tuple[int, int]:
    """Count products of a forward, and of the backward of a loss on the last levels or on intermediate outputs."""
    net.memory = memory
    with Matmuls() as forward:
        levels = net(stem_of(net)) if taps is None else net(stem_of(net), taps=taps)[1]
    loss = loss_of(levels)
    with Matmuls() as backward:
        loss.backward()
    return forward.count, backward.count


def spared(net: ReversibleColumns) -> int:
    """Count the products of the first column after the last tensor that their cell saves.

    Only the state needs them, and these cells rebuild no other state, so no replay runs them.
    """
    count, last, hooks, handles = 0, 0, [], []

    def pack(tensor: Tensor) -> Tensor:
        nonlocal last
        last = counter.count
        return tensor.detach()

    def enter(*_) -> None:
        hooks.append(saved_tensors_hooks(pack, lambda tensor: tensor))
        hooks[-1].__enter__()

    def leave(*_) -> None:
        nonlocal count
        hooks.pop().__exit__(None, None, None)
        count += counter.count - last

    for cell in net.cells[0]:
        handles += [cell.register_forward_pre_hook(enter), cell.register_forward_hook(leave)]
    with net.using(modes="store"), Matmuls() as counter:
        net(stem_of(net))
    for handle in handles:
        handle.remove()
    return count


@pytest.mark.parametrize("memory", TAPED)
@pytest.mark.parametrize("make", [image_net, lambda: token_net(blocks=("mlp", "conv", "attention"))])
def test_backward_costs_store_and_one_forward(make, memory):
    net = make()
    forward, backward = matmuls(net, "store")
    assert forward > 0
    assert backward > forward
    assert spared(net) > 0
    assert matmuls(net, memory) == (forward, backward + forward - spared(net))


@pytest.mark.parametrize("memory", TAPED)
@pytest.mark.parametrize("taps", [[0], [1], [3], [0, 1, 2, 3]])
def test_loss_on_intermediate_outputs_costs_at_most_one_more_forward(taps, memory):
    net = token_net(blocks=("mlp", "conv", "attention"))
    forward, backward = matmuls(net, "store", taps)
    expected = forward - spared(net)
    if memory == "recompute":  # states are kept, so cells after the last tap are not replayed
        expected = sum(matmuls_of_column(net, column) for column in range(max(taps) + 1))
    assert matmuls(net, memory, taps) == (forward, backward + expected)


def matmuls_of_column(net: ReversibleColumns, column: int) -> int:
    counts = []
    for memory in ("store", ["recompute" if index == column else "store" for index in range(net.graph.columns)]):
        counts.append(matmuls(net, memory)[1])
    return counts[1] - counts[0]


def test_stored_columns_are_not_replayed():
    net = token_net(blocks=("mlp", "conv"))
    forward, backward = matmuls(net, "store")
    extra = matmuls_of_column(net, 2)
    assert 0 < extra < forward
    assert matmuls(net, ["store", "store", "exact", "store"]) == (forward, backward + extra)


@pytest.mark.parametrize(("memory", "replayed"), [("recompute", 7), ("exact", 2 + 2 * 5)])
def test_replay_with_a_kept_state_ends_at_the_last_saved_tensor(memory, replayed):
    """Only the sum needs the second product of a block; two cells have no residual and rebuild no state."""
    blocks = [nn.Sequential(nn.Linear(5, 11), nn.GELU(), nn.Linear(11, 5)) for _ in range(7)]
    net = ReversibleSequence(blocks, m=2, gain=0.5)
    counts = []
    for mode in ("store", memory):
        net.memory = mode
        loss = loss_of(net(torch.randn(3, 5)))
        with Matmuls() as counter:
            loss.backward()
        counts.append(counter.count)
    assert counts[1] == counts[0] + replayed


@pytest.mark.parametrize("memory", TAPED)
def test_each_further_backward_costs_at_most_one_forward(memory):
    net = token_net(blocks=("mlp", "conv"), memory=memory)
    forward, backward = matmuls(net, "store")
    net.memory = memory
    loss = loss_of(net(stem_of(net)))
    for _ in range(3):
        with Matmuls() as count:
            loss.backward(retain_graph=True)
        assert count.count == backward + forward - spared(net)


# --------------------------------------------------------------------------------------- bytes


def kept(columns: int, memory: str, batch: int = 16, **options) -> int:
    """Bytes alive after a forward pass, including its outputs."""
    net = token_net(columns=columns, dims=(32, 48, 64), blocks=("mlp", "conv"), memory=memory, **options)
    x = stem_of(net, batch)
    with Kept() as mode:
        levels = net(x)
    held = mode.bytes()
    assert held >= sum(level.nbytes for level in levels)
    return held


ELEMENTS = 16 * (4 * 32 + 2 * 48 + 1 * 64)
"""Elements of the states of one column in `kept`."""


@pytest.mark.parametrize(("memory", "low", "high"), [("invert", 0, 0), ("exact", 1e-9, 1.3), ("recompute", 4, 4)])
def test_bytes_per_state_element_of_an_added_column(memory, low, high):
    sizes = [kept(columns, memory) for columns in (2, 4, 8, 16)]
    for (few, fewer), (many, more) in zip([(2, sizes[0]), (4, sizes[1])], [(8, sizes[2]), (16, sizes[3])], strict=True):
        assert low <= (more - fewer) / (many - few) / ELEMENTS <= high


def test_store_keeps_several_times_more():
    assert kept(8, "store") > 4 * kept(8, "recompute")


@pytest.mark.parametrize("memory", ["recompute", "invert"])
def test_frozen_prefix_keeps_nothing(memory):
    """The tape keeps nothing of cells before the first one that needs a gradient."""

    def frozen(columns: int) -> int:
        net = token_net(columns=columns, memory=memory)
        net.cells[:-2].requires_grad_(False)
        with Kept() as mode:
            levels = net(stem_of(net, grad=False))
        assert levels[0].requires_grad
        return mode.bytes()

    assert frozen(12) == frozen(4)


@pytest.mark.parametrize("memory", ["invert", "exact"])
def test_nested_columns_keep_nothing_themselves(memory):
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.columns = token_net(m=2, columns=3, dims=(32, 32), halve=False, memory=memory)

        def forward(self, x: Tensor) -> Tensor:
            return self.columns(x)[-1]

    def outer(cells: int) -> int:
        net = ReversibleSequence([Inner() for _ in range(cells)], m=2, gain=0.5, memory=memory)
        with Kept() as mode:
            levels = net(torch.randn(16, 2, 32))
        assert levels[0].requires_grad
        return mode.bytes()

    assert outer(12) - outer(4) <= (1.3 * 8 * 16 * 2 * 32 if memory == "exact" else 0)


def peak_of_backward(columns: int, memory: str) -> int:
    net = token_net(columns=columns, dims=(32, 48, 64), blocks=("mlp", "conv"), memory=memory)
    x = stem_of(net, 16)
    loss_of(net(x)).backward()  # allocates the gradients
    mode = Kept(peak=True)
    with mode:
        loss = loss_of(net(x))
        loss.backward()
    return mode.highest


def test_peak_of_a_step_barely_grows():
    assert peak_of_backward(12, "invert") == peak_of_backward(4, "invert")
    grown = peak_of_backward(12, "exact") - peak_of_backward(4, "exact")
    assert grown / 8 / ELEMENTS <= 1.3


# --------------------------------------------------------------------------------------- freed memory


@pytest.fixture
def no_collector():
    """Disable the garbage collector, so that only reference counting frees memory."""
    gc.disable()
    yield
    gc.enable()


def nets():
    yield token_net(blocks=("mlp", "dropout", "batchnorm", "conv", "inplace", "droppath"))
    yield image_net()


def tape_of(net: ReversibleColumns, *args, **kwargs):
    """Return the result of a forward pass and a weak reference to its tape."""
    with tapes() as started:
        result = net(*args, **kwargs)
    (tape,) = started
    started.clear()
    return result, weakref.ref(tape)


def grads(net: ReversibleColumns, x: Tensor) -> int:
    """Bytes of the gradients."""
    tensors = [*net.parameters(), x]
    return sum(tensor.grad.nbytes for tensor in tensors if tensor.grad is not None)


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_only_gradients_are_alive_after_backward(memory, no_collector):
    for net in nets():
        net.memory = memory
        x = stem_of(net)
        buffers = [buffer.clone() for buffer in net.buffers()]
        with Kept() as mode:
            levels = net(x)
            loss = loss_of(levels)
            loss.backward()
            outputs = sum(level.nbytes for level in levels)
            assert mode.bytes() <= outputs + loss.nbytes + grads(net, x)
            del levels, loss
            assert mode.bytes() == grads(net, x)
        assert len(buffers) == len(list(net.buffers()))


@pytest.mark.parametrize("memory", TAPED)
def test_tape_is_freed_after_backward(memory, no_collector):
    for net in nets():
        net.memory = memory
        levels, tape = tape_of(net, stem_of(net))
        loss = loss_of(levels)
        loss.backward(retain_graph=True)
        assert tape() is not None
        loss.backward()
        assert tape() is None  # although levels and loss are still alive


def held_near_the_end(memory: str, columns: int, retain_graph: bool) -> int:
    """Bytes alive, without gradients, when backward reaches the first column."""
    net = token_net(columns=columns, dims=(32, 48, 64), blocks=("mlp", "conv"), memory=memory)
    x, found = stem_of(net, 16), []
    with Kept() as mode:
        levels, (low,) = net(x, taps=[0])
        low.register_hook(lambda _: found.append(mode.bytes() - grads(net, x)))  # the tape is still needed here
        loss = loss_of(levels)
        del levels
        loss.backward(retain_graph=retain_graph)
    return found[0]


@pytest.mark.parametrize("memory", TAPED)
def test_backward_frees_the_cells_it_has_passed(memory, no_collector):
    few, dropped = (held_near_the_end(memory, columns, False) for columns in (4, 8))
    assert few == dropped
    few, many = (held_near_the_end(memory, columns, True) for columns in (4, 8))
    assert {"recompute": 4, "invert": 0, "exact": 0.2}[memory] <= (many - few) / 4 / ELEMENTS
    assert many - dropped >= 4 * ELEMENTS  # the top window


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_deleted_graph_frees_everything(memory, no_collector):
    for net in nets():
        net.memory = memory
        x = stem_of(net)
        with Kept() as mode:
            levels = net(x)
            del levels
        assert mode.bytes() == 0


@pytest.mark.parametrize("memory", TAPED)
def test_graph_deleted_during_backward_frees_everything(memory, no_collector):
    net = token_net(blocks=("mlp", "dropout"), memory=memory)
    x = stem_of(net)
    with Kept() as mode:
        (levels, tapped), tape = tape_of(net, x, taps=[1])
        grad = torch.autograd.grad(loss_of(tapped), net.cells[1][1].gain.weight, retain_graph=True)[0]
        assert tape() is not None
        del levels, tapped
        assert tape() is None
        assert mode.bytes() == grad.nbytes


@pytest.mark.parametrize("memory", TAPED)
def test_double_backward_frees_everything(memory, no_collector):
    net = token_net(blocks=("mlp", "dropout"), memory=memory)
    x = stem_of(net)
    with Kept() as mode:
        (slope,) = torch.autograd.grad(loss_of(net(x)), x, create_graph=True)
        slope.square().sum().backward()
        del slope
        assert mode.bytes() == grads(net, x)


@pytest.mark.parametrize("memory", TAPED)
def test_error_in_backward_frees_everything(memory, no_collector):
    net = token_net(memory=memory)
    with Kept() as mode:
        levels, tape = tape_of(net, stem_of(net))
        with torch.no_grad():
            net.flat()[4].gain.weight.add_(1)
        with pytest.raises(ReplayError):
            loss_of(levels).backward()
        del levels
    assert tape() is None
    net.zero_grad()
    assert mode.bytes() == 0
