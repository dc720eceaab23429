"""The replay context: random numbers, buffers, flags, autocast and versions, restored and reset."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from revnets.engine.errors import ReplayError
from revnets.engine.replay.replay_context import ReplayContext
from tests.support.errors import raises_error

NOWHERE: frozenset[torch.device] = frozenset()


class Noisy(nn.Module):
    """Draws a random number, counts its calls, and returns its context."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("table", torch.arange(3.0))

    def forward(self):
        self.calls += 1
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        return torch.rand(2).tolist(), self.calls.item(), self.training, kind


def record(module: nn.Module):
    with ReplayContext.record(module, NOWHERE, {}) as context:
        result = module()
    return context, result


def test_replay_repeats_the_forward_without_side_effects():
    module = Noisy()
    module()
    with torch.autocast("cpu", torch.bfloat16):
        context, result = record(module)
    module.eval()
    module.calls.fill_(40)
    torch.manual_seed(3)
    expected = torch.rand(2)

    torch.manual_seed(3)
    for _ in range(2):
        with context.restored():
            assert module() == result
    assert torch.equal(torch.rand(2), expected)
    assert module.calls.item() == 40
    assert not module.training
    assert not torch.is_autocast_enabled("cpu")


def test_forward_without_autocast_is_replayed_without_autocast():
    module = Noisy()
    context, result = record(module)
    assert result[-1] is None
    with torch.autocast("cpu", torch.bfloat16):
        with context.restored():
            assert module() == result
        assert torch.is_autocast_enabled("cpu")


def test_context_is_reset_after_an_error():
    module = Noisy()
    context, _ = record(module)
    module.eval()
    torch.manual_seed(3)
    state, calls = torch.get_rng_state(), module.calls
    module.register_forward_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError), context.restored():
        module()
    assert torch.equal(torch.get_rng_state(), state)
    assert module.calls is calls
    assert not module.training


def test_only_changed_buffers_are_kept():
    quiet, x = nn.BatchNorm1d(3).eval(), torch.randn(2, 3)
    with ReplayContext.record(quiet, NOWHERE, {}) as context:
        quiet(x)
    assert not context._random.states
    assert not context._buffers.written
    context, _ = record(Noisy())
    assert list(context._random.states) == [0]
    assert [name for _, name in context._buffers.written] == ["calls"]


def test_replaced_buffer_counts_as_written():
    class Moving(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))

        def forward(self):
            self.mean = self.mean + 1
            return self.mean.item()

    module = Moving()
    context, result = record(module)
    now = module.mean
    with context.restored():
        assert module() == result == 1
    assert module.mean is now


def test_shared_buffer_stays_shared():
    left, right = Noisy(), Noisy()
    right.calls = left.calls

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = left, right

        def forward(self):
            self.left()
            return self.right()[1]

    module = Both()
    context, result = record(module)
    assert result == 2
    with context.restored():
        assert module() == result


def test_changed_parameter_raises():
    module = Noisy()
    context, _ = record(module)
    with torch.no_grad():
        module.weight.add_(1)
    with raises_error(ReplayError, code="changed-in-place", names="optimizer step"), context.restored():
        pass
