"""Buffers of cells: large read-only buffers are not copied, and written buffers are correct in the replay."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revnets import ReplayError, ReversibleColumns
from revnets.engine.replay.buffers import SMALL
from tests.support.counters import Kept
from tests.support.errors import raises_error
from tests.support.gradients import assert_like_autograd, assert_same, loss_of, step
from tests.support.networks import cells_net, tokens

ROWS = SMALL // 8  # a (ROWS, 6) float32 table is three times the size that is always copied


class Copies(TorchDispatchMode):
    """Counts new tensors larger than `SMALL`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.nbytes > SMALL and leaf.untyped_storage()._cdata not in known:
                self.names.append(str(func))
        return result


class Table(nn.Module):
    """Adds the first rows of a large table; subclasses write the table in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("table", torch.linspace(-1, 1, ROWS * 6).view(ROWS, 6))

    def write(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        self.write()
        return torch.tanh(self.linear(x) * self.table[: x.shape[1]])


class InPlace(Table):
    def write(self) -> None:
        if self.training:
            self.table.mul_(0.9)


class Replaced(Table):
    def write(self) -> None:
        self.table = self.table * 0.9


class ThroughData(Table):
    def write(self) -> None:
        self.table.data.mul_(0.9)


class Late(Table):
    """Writes from the second forward pass on, according to a step counter in its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def write(self) -> None:
        self.calls += 1
        if self.calls > 1:
            self.table.mul_(0.9)


class MadeLate(nn.Module):
    """Creates its only buffer, a call counter, in its first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if "calls" not in dict(self.named_buffers()):
            self.register_buffer("calls", torch.zeros(()))
        self.calls += 1
        return torch.tanh(self.linear(x))


def net_of(kind: type[Table], memory: str = "exact", cells: int = 6) -> ReversibleColumns:
    return cells_net([kind() for _ in range(cells)], memory=memory)


def train(net: ReversibleColumns, x: Tensor) -> list[Tensor]:
    """Run three steps."""
    result: list[Tensor] = []
    for _ in range(3):
        levels = net(x)
        loss_of(levels).backward()
        result += levels
    return result


@pytest.mark.parametrize("memory", ["recompute", "exact"])
def test_large_read_only_buffer_is_copied_only_in_the_first_forward(memory):
    net, x = net_of(Table, memory), tokens()
    with Copies() as first:
        loss = loss_of(net(x))
    assert first.names == ["aten.clone.default"] * 6
    with Copies() as backward:
        loss.backward()
    with Copies() as second:
        loss_of(net(x)).backward()
    assert backward.names == second.names == []


def test_copies_of_large_buffers_are_freed():
    net, x = net_of(Table), tokens()
    for _ in range(2):
        with Kept(peak=True) as mode:
            levels = net(x)
        assert mode.bytes() < SMALL
    assert mode.highest < SMALL
    assert len(levels) == 2


def test_written_buffer_is_copied_in_every_forward():
    net, x = net_of(InPlace), tokens()
    for _ in range(3):
        with Copies() as copies:
            levels = net(x)
        assert copies.names == ["aten.clone.default"] * 6
        loss_of(levels).backward()


@pytest.mark.parametrize("kind", [Table, InPlace, Replaced])
def test_gradients_and_buffers_over_several_steps(kind):
    assert_like_autograd(net_of(kind), tokens(), train)


@pytest.mark.parametrize("memory", ["recompute", "exact"])
def test_writes_through_data_are_detected(memory):
    net, x = net_of(ThroughData), tokens()
    expected = step(net, x, "store", train)
    assert_same(step(net, x, memory, train), expected)


@pytest.mark.parametrize("memory", ["recompute", "exact"])
def test_train_after_eval(memory):
    """Tables that are read-only in eval mode may be written in training."""

    def both(net: ReversibleColumns, x: Tensor) -> list[Tensor]:
        result = train(net.eval(), x) + train(net.train(), x)
        return result + train(net.eval(), x)

    net, x = net_of(InPlace), tokens()
    expected = step(net, x, "store", both)
    assert_same(step(net, x, memory, both), expected)


@pytest.mark.parametrize("memory", ["recompute", "exact"])
def test_late_write_to_a_large_buffer_raises_once(memory):
    net, x = net_of(Late, memory), tokens()
    loss_of(net(x)).backward()
    loss = loss_of(net(x))
    with raises_error(ReplayError, code="buffer-lost", names=["table", "Late", "Run this step again"]):
        loss.backward()
    net.zero_grad()
    expected = step(net, x, "store", train)
    assert_same(step(net, x, memory, train), expected)


def test_write_to_a_large_buffer_only_in_the_replay_raises():
    class Fickle(Table):
        calls = 0

        def write(self) -> None:
            self.calls += 1
            if self.calls == 2:
                self.table.mul_(1)

    loss = loss_of(net_of(Fickle)(tokens()))
    with raises_error(ReplayError, code="replay-mismatch", names=["table", "Fickle"]):
        loss.backward()


def test_buffers_of_a_replaced_module_are_checked_again():
    net, x = net_of(Table), tokens()
    loss_of(net(x)).backward()
    for cell in net.flat():
        cell.function = InPlace()
    assert_like_autograd(net, x, train)


def test_replay_uses_large_buffers_of_functional_call():
    net, x = net_of(Table), tokens()
    others = {name: buffer.flip(0) for name, buffer in net.named_buffers()}

    def passed(net: ReversibleColumns, x: Tensor) -> list[Tensor]:
        result: list[Tensor] = []
        for _ in range(2):
            levels = torch.func.functional_call(net, others, (x,))
            loss_of(levels).backward()
            result += levels
        return result

    expected = step(net, x, "store", passed)
    assert_same(step(net, x, "exact", passed), expected)


@pytest.mark.parametrize("memory", ["recompute", "exact"])
def test_replay_does_not_write_the_first_buffer_of_a_cell_again(memory):
    net = cells_net([MadeLate() for _ in range(6)], memory=memory)
    for calls in (1, 2):
        loss_of(net(tokens())).backward()
        assert [int(buffer) for buffer in net.buffers()] == [calls] * 6


def test_buffer_records_do_not_keep_a_cell_alive():
    net = net_of(Table)
    loss_of(net(tokens())).backward()
    cells = [weakref.ref(cell) for cell in net.flat()]
    del net
    gc.collect()
    assert not any(cell() for cell in cells)
