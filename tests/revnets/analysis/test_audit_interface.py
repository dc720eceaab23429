"""Audits of models that are not reversible, their side effects, and their arguments."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from revnets.analysis.audit import ROUNDS, audit
from revnets.analysis.gradient_distance import same_bits
from revnets.engine.columns import ReversibleSequence
from revnets.engine.columns_group import find_columns
from revnets.engine.errors import ArgumentError
from tests.support.audit_networks import ConvLevel, Net, by_mode, conv_columns, render, stem_output
from tests.support.errors import raises_error

# --------------------------------------------------------------------------------------- models that are not reversible


class _Counting(nn.Module):
    """Computes a different function in every call."""

    def __init__(self, dim: int, read_dims: list[int], paths: bool):
        super().__init__()
        self.inner = ConvLevel(dim, read_dims)
        self.calls = 0
        self.paths = paths

    def forward(self, *reads: Tensor) -> Tensor:
        self.calls += 1
        update = self.inner(*reads)
        if self.paths:
            return update.sin() if self.calls % 2 else update
        return update * (1 + 0.5 * (self.calls % 2))


def test_cell_with_different_results_in_its_replay_is_detected():
    result = audit(conv_columns(3, make=_Counting, paths=False), stem_output())
    modes = by_mode(result)
    assert result.noise > 0  # two runs of store differ, so the limit is large
    assert not all(column.exact for column in result.columns)
    assert not modes["exact"].equal
    assert not result.ok


def test_cell_with_different_operations_in_its_replay_fails():
    result = audit(conv_columns(3, make=_Counting, paths=True), stem_output())
    exact = by_mode(result)["exact"]
    assert "replay" in exact.failure
    assert math.isnan(exact.gradient_error)
    assert math.isnan(exact.seconds)
    assert result.verdict(exact) == "wrong"
    assert not result.ok
    text = render(result)
    assert "FAILED" in text
    assert "Usual causes" in text


def test_cell_that_changes_its_input_in_place_fails_except_in_store():
    class Careless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().add_(1) + x

    columns = ReversibleSequence([nn.Linear(6, 6), nn.Linear(6, 6), Careless(), nn.Linear(6, 6)], m=2)
    result = audit(columns, torch.randn(3, 6))
    assert [bool(mode.failure) for mode in result.modes] == [False, True, True, True]
    assert result.columns == ()
    assert not result.ok
    assert "could not be rebuilt" in render(result)


class _Noise(torch.autograd.Function):
    """The identity with a gradient that differs slightly in every call, as from a kernel with atomic additions."""

    generator = torch.Generator()

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-6 * torch.rand(grad.shape, generator=_Noise.generator))


def test_nondeterministic_kernels_raise_the_limit():
    class Noisy(ConvLevel):
        def forward(self, *reads: Tensor) -> Tensor:
            return _Noise.apply(super().forward(*reads))

    result = audit(conv_columns(3, make=Noisy), stem_output())
    modes = by_mode(result)
    assert 0 < result.noise < 1e-5
    assert not modes["exact"].equal
    assert result.verdict(modes["exact"]) == "drift"
    assert all(column.exact for column in result.columns)
    assert result.ok
    assert "not deterministic" in render(result)
    assert not replace(result, noise=0.0).ok


# ------------------------------------------------------------------------------------------------------- side effects


def _state(net: nn.Module) -> list:
    return [
        {name: tensor.clone() for name, tensor in net.state_dict().items()},
        [None if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()],
        [parameter._version for parameter in net.parameters()],
        [module.training for module in net.modules()],
        net.columns.memory,
        torch.get_rng_state(),
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()],
    ]


def _equal_states(a: list, b: list) -> bool:
    buffers = all(same_bits(a[0][name], b[0][name]) for name in a[0])
    gradients = all(
        (x is None) == (y is None) and (x is None or same_bits(x, y)) for x, y in zip(a[1], b[1], strict=True)
    )
    return buffers and gradients and a[2:5] == b[2:5] and torch.equal(a[5], b[5]) and a[6] == b[6]


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing):
    net, image = Net(conv_columns(3, drop=0.3, norm=nn.BatchNorm1d)), torch.randn(2, 3, 6, 6)
    net(image).sum().backward()
    net.head.bias.grad = None
    net.columns.cells[1].eval()
    net.columns.memory = ["store", "invert", "recompute"]
    before, gradient = _state(net), net.head.weight.grad
    if failing:
        with pytest.raises(ZeroDivisionError):
            audit(net, image, loss=lambda _: 1 / 0)
    else:
        audit(net, image)
    assert _equal_states(before, _state(net))
    assert net.head.weight.grad is gradient
    net(image)
    assert not _equal_states(before, _state(net))  # BatchNorm and the generator have changed


def test_the_same_seed_gives_the_same_numbers():
    columns, x = conv_columns(3, drop=0.3), stem_output()
    first = audit(columns, x, seed=1)
    torch.randn(10)
    assert audit(columns, x, seed=1) == first
    assert audit(columns, x, seed=2) != first
    assert audit(columns, x, modes=["exact"], seed=1).columns == first.columns


# ---------------------------------------------------------------------------------------------------------- arguments


def test_columns_are_found_in_submodules():
    columns = conv_columns(2)
    net = Net(columns)
    assert list(find_columns(columns)) == [columns]
    assert list(find_columns(net)) == [columns]
    assert list(find_columns(nn.Sequential(nn.Identity(), net))) == [columns]
    several = nn.ModuleDict({"a": conv_columns(1), "b": conv_columns(1)})
    assert list(find_columns(several)) == [several["a"], several["b"]]
    several.columns = columns
    assert list(find_columns(several)) == [columns]
    with raises_error(ArgumentError, code="no-columns", key="model", names="Linear"):
        find_columns(nn.Linear(1, 1))


def test_steps_are_timed_without_counters(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "process_time", lambda: float(next(clock)))
    result = audit(conv_columns(2), stem_output(), modes=("store", "exact"))
    assert [mode.seconds for mode in result.modes] == [1.0, 1.0]
    assert next(clock) == 2 * 2 * ROUNDS  # only these steps are timed


def test_only_requested_modes_are_measured_and_reported():
    messages: list[str] = []
    result = audit(conv_columns(2), stem_output(), modes=["exact"], progress=messages.append)
    assert [mode.mode for mode in result.modes] == ["exact"]
    assert messages == ["store", "store, second run", "exact", "time", "reconstruction"]
    assert audit(conv_columns(2), stem_output(), modes="invert").modes[0].mode == "invert"
    assert "exact" in render(result)


@pytest.mark.parametrize(
    ("change", "key", "code", "names"),
    [
        ({"modes": ["exakt"]}, "modes", "unknown-choice", ["'exakt'", "store, recompute, invert, exact"]),
        ({"loss": lambda levels: levels[0]}, "loss", "invalid-value", "one element"),
        ({"loss": lambda levels: levels[0].detach().sum()}, "loss", "invalid-value", "requires a gradient"),
        ({"loss": lambda levels: 3}, "loss", "invalid-value", "one element"),
        ({"loss": lambda levels: levels[0].sum() * math.nan}, "model", "not-finite", "memory mode store"),
    ],
)
def test_invalid_arguments(change, key, code, names):
    with raises_error(ArgumentError, code=code, key=key, names=names):
        audit(conv_columns(2), stem_output(), **change)


def test_frozen_model():
    columns = conv_columns(2).requires_grad_(False)
    with raises_error(ArgumentError, code="no-gradient", key="model", names=["parameter", "input"]):
        audit(columns, stem_output())
    net = Net(columns)
    net.stem.requires_grad_(False)
    net.register_parameter("unused", nn.Parameter(torch.ones(1)))
    net.head.requires_grad_(False)
    with raises_error(ArgumentError, code="no-gradient", key="model", names="output"):
        audit(net, torch.randn(2, 3, 6, 6))
