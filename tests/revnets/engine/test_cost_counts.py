"""What a pass costs, counted: matrix products, bytes kept, and what is left alive."""

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

pytestmark = pytest.mark.filterwarnings("ignore::revnets.DriftWarning")  # no gradient is looked at


# --------------------------------------------------------------------------------------- matrix products


def matmuls(net: ReversibleColumns, memory: str, taps: Sequence[int] | None = None) -> tuple[int, int]:
    """Of a forward, and of the backward of a loss on the last levels or on the taps."""
    net.memory = memory
    with Matmuls() as forward:
        levels = net(stem_of(net)) if taps is None else net(stem_of(net), taps=taps)[1]
    loss = loss_of(levels)
    with Matmuls() as backward:
        loss.backward()
    return forward.count, backward.count


def spared(net: ReversibleColumns) -> int:
    """Products of the first column that come after the last tensor which their cell saves.

    They serve the state alone, and those cells have no other state to rebuild from it: no replay runs them.
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
def test_backward_is_that_of_store_and_one_forward(make, memory):
    net = make()
    forward, backward = matmuls(net, "store")
    assert forward > 0
    assert backward > forward
    assert spared(net) > 0
    assert matmuls(net, memory) == (forward, backward + forward - spared(net))


@pytest.mark.parametrize("memory", TAPED)
@pytest.mark.parametrize("taps", [[0], [1], [3], [0, 1, 2, 3]])
def test_a_loss_on_taps_costs_one_more_forward_at_most(taps, memory):
    net = token_net(blocks=("mlp", "conv", "attention"))
    forward, backward = matmuls(net, "store", taps)
    expected = forward - spared(net)
    if memory == "recompute":  # states are at hand: what lies behind the last tap is not run again
        expected = sum(matmuls_of_column(net, column) for column in range(max(taps) + 1))
    assert matmuls(net, memory, taps) == (forward, backward + expected)


def matmuls_of_column(net: ReversibleColumns, column: int) -> int:
    counts = []
    for memory in ("store", ["recompute" if index == column else "store" for index in range(net.graph.columns)]):
        counts.append(matmuls(net, memory)[1])
    return counts[1] - counts[0]


def test_stored_columns_are_not_run_again():
    net = token_net(blocks=("mlp", "conv"))
    forward, backward = matmuls(net, "store")
    extra = matmuls_of_column(net, 2)
    assert 0 < extra < forward
    assert matmuls(net, ["store", "store", "exact", "store"]) == (forward, backward + extra)


@pytest.mark.parametrize(("memory", "replayed"), [("recompute", 7), ("exact", 2 + 2 * 5)])
def test_a_replay_with_its_state_at_hand_ends_with_the_last_saved_tensor(memory, replayed):
    """The second product of a block serves its sum alone; two cells have no residual, and so no state to rebuild."""
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
def test_each_further_backward_costs_one_more_forward_at_most(memory):
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
    """Bytes that a forward leaves behind for its backward, the outputs included."""
    net = token_net(columns=columns, dims=(32, 48, 64), blocks=("mlp", "conv"), memory=memory, **options)
    x = stem_of(net, batch)
    with Kept() as mode:
        levels = net(x)
    held = mode.bytes()
    assert held >= sum(level.nbytes for level in levels)
    return held


ELEMENTS = 16 * (4 * 32 + 2 * 48 + 1 * 64)
"""Of the states of one column in `kept`."""


@pytest.mark.parametrize(("memory", "low", "high"), [("invert", 0, 0), ("exact", 1e-9, 1.3), ("recompute", 4, 4)])
def test_bytes_a_state_element_for_each_added_column(memory, low, high):
    sizes = [kept(columns, memory) for columns in (2, 4, 8, 16)]
    for (few, fewer), (many, more) in zip([(2, sizes[0]), (4, sizes[1])], [(8, sizes[2]), (16, sizes[3])], strict=True):
        assert low <= (more - fewer) / (many - few) / ELEMENTS <= high


def test_store_keeps_far_more():
    assert kept(8, "store") > 4 * kept(8, "recompute")


@pytest.mark.parametrize("memory", ["recompute", "invert"])
def test_a_frozen_prefix_costs_nothing(memory):
    """Cells below everything that needs a gradient leave nothing in the tape."""

    def frozen(columns: int) -> int:
        net = token_net(columns=columns, memory=memory)
        net.cells[:-2].requires_grad_(False)
        with Kept() as mode:
            levels = net(stem_of(net, grad=False))
        assert levels[0].requires_grad
        return mode.bytes()

    assert frozen(12) == frozen(4)


@pytest.mark.parametrize("memory", ["invert", "exact"])
def test_columns_inside_a_cell_keep_nothing_of_their_own(memory):
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
    loss_of(net(x)).backward()  # gradients exist from now on
    mode = Kept(peak=True)
    with mode:
        loss = loss_of(net(x))
        loss.backward()
    return mode.highest


def test_the_peak_of_a_step_does_not_grow_either():
    assert peak_of_backward(12, "invert") == peak_of_backward(4, "invert")
    grown = peak_of_backward(12, "exact") - peak_of_backward(4, "exact")
    assert grown / 8 / ELEMENTS <= 1.3


# --------------------------------------------------------------------------------------- what is left alive


@pytest.fixture
def no_collector():
    """Reference counting alone has to do it."""
    gc.disable()
    yield
    gc.enable()


def nets():
    yield token_net(blocks=("mlp", "dropout", "batchnorm", "conv", "inplace", "droppath"))
    yield image_net()


def tape_of(net: ReversibleColumns, *args, **kwargs):
    """The result of a forward, and a weak reference to its tape."""
    with tapes() as started:
        result = net(*args, **kwargs)
    (tape,) = started
    started.clear()
    return result, weakref.ref(tape)


def grads(net: ReversibleColumns, x: Tensor) -> int:
    """Bytes that a backward is meant to leave behind."""
    tensors = [*net.parameters(), x]
    return sum(tensor.grad.nbytes for tensor in tensors if tensor.grad is not None)


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_backward_leaves_nothing_but_gradients(memory, no_collector):
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
def test_a_tape_ends_with_its_backward(memory, no_collector):
    for net in nets():
        net.memory = memory
        levels, tape = tape_of(net, stem_of(net))
        loss = loss_of(levels)
        loss.backward(retain_graph=True)
        assert tape() is not None
        loss.backward()
        assert tape() is None  # although levels and loss are still there


def held_near_the_end(memory: str, columns: int, retain_graph: bool) -> int:
    """Bytes alive when a backward has come down to the first column, besides the gradients."""
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
def test_what_backward_has_passed_is_dropped_as_it_goes(memory, no_collector):
    few, dropped = (held_near_the_end(memory, columns, False) for columns in (4, 8))
    assert few == dropped
    few, many = (held_near_the_end(memory, columns, True) for columns in (4, 8))
    assert {"recompute": 4, "invert": 0, "exact": 0.2}[memory] <= (many - few) / 4 / ELEMENTS
    assert many - dropped >= 4 * ELEMENTS  # the top window


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_a_graph_that_is_dropped_leaves_nothing(memory, no_collector):
    for net in nets():
        net.memory = memory
        x = stem_of(net)
        with Kept() as mode:
            levels = net(x)
            del levels
        assert mode.bytes() == 0


@pytest.mark.parametrize("memory", TAPED)
def test_a_graph_that_is_dropped_half_way(memory, no_collector):
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
def test_a_double_backward_leaves_nothing(memory, no_collector):
    net = token_net(blocks=("mlp", "dropout"), memory=memory)
    x = stem_of(net)
    with Kept() as mode:
        (slope,) = torch.autograd.grad(loss_of(net(x)), x, create_graph=True)
        slope.square().sum().backward()
        del slope
        assert mode.bytes() == grads(net, x)


@pytest.mark.parametrize("memory", TAPED)
def test_an_error_in_the_backward_leaves_nothing(memory, no_collector):
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
