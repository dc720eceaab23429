"""Gains, the coupling and its inverse, and the dtype and strides of states."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from revnets.engine.cell import Cell, FixedGain, Gain, first_state
from revnets.engine.coupling import add, subtract
from revnets.engine.errors import ArgumentError
from tests.support.errors import raises_error


@pytest.mark.parametrize(
    ("weight", "gamma"),
    [(0.5, 0.5), (-0.5, -0.5), (1e-3, 1e-3), (1e-5, 1e-3), (-1e-5, -1e-3), (0.0, 1e-3), (-0.0, 1e-3), (7.0, 7.0)],
)
def test_gain_is_bounded_away_from_zero(weight, gamma):
    gain = Gain(3, weight)
    torch.testing.assert_close(gain(), torch.full((3,), gamma), rtol=0, atol=0)
    assert torch.equal(gain.weight, torch.full((3,), weight))  # forward does not change the weight


@pytest.mark.parametrize("weight", [0.5, 1e-5, 0.0, -1e-5])
def test_gain_has_a_straight_through_gradient(weight):
    gain = Gain(3, weight)
    (gain() * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert torch.equal(gain.weight.grad, torch.tensor([1.0, 2.0, 3.0]))


def test_gain_can_leave_zero():
    gain = Gain(1, 0.0)
    optimizer = torch.optim.SGD(gain.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (gain() - 0.5).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(gain(), torch.tensor([0.5]), rtol=0, atol=0.02)


def test_invalid_gains_raise():
    with raises_error(ArgumentError, code="out-of-range", key="min_abs", names="0"):
        Gain(3, min_abs=0)
    with raises_error(ArgumentError, code="out-of-range", key="value", names="0"):
        FixedGain(0)


@pytest.mark.parametrize("gamma", [1.0, 0.25, -3.0, torch.tensor([0.5, -0.1, 2.0], dtype=torch.float64)])
def test_subtract_undoes_add(gamma):
    past, update = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    state = add(past, update, gamma)
    torch.testing.assert_close(state, update + gamma * past)
    torch.testing.assert_close(subtract(state, update, gamma), past, rtol=1e-12, atol=1e-12)


def test_subtract_does_not_change_its_arguments():
    state, update = torch.randn(2, 3), torch.randn(2, 3)
    copies = state.clone(), update.clone()
    subtract(state, update, torch.tensor([0.5, 0.5, 0.5]))
    assert torch.equal(state, copies[0])
    assert torch.equal(update, copies[1])


@pytest.mark.parametrize("gamma", [1.0, 0.5, torch.tensor([0.5, 0.5, 0.5])])
def test_state_has_the_dtype_of_the_state_it_replaces(gamma):
    past, update = torch.randn(2, 3), torch.randn(2, 3, dtype=torch.bfloat16)
    state = add(past, update, gamma)
    assert state.dtype == torch.float32
    assert subtract(state, update, gamma).dtype == torch.float32


def test_states_stay_in_float32_under_autocast():
    half = torch.randn(2, 3, dtype=torch.bfloat16)
    assert first_state(half).dtype == torch.bfloat16  # a model converted to bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert first_state(half).dtype == torch.float32
        assert first_state(half.double()).dtype == torch.float64


def test_states_are_dense():
    whole = torch.randn(4, 6, 5)
    for sparse in (whole[:, ::2], whole[..., 1:], torch.randn(4, 1, 5).expand(4, 6, 5)):
        state = first_state(sparse)
        assert torch.equal(state, sparse)
        assert state.is_contiguous()
    for dense in (whole, whole.permute(2, 0, 1), whole[1:3], torch.randn(1, 5, 1).transpose(0, 2)):
        assert first_state(dense) is dense


def test_cell_uses_the_coupling_of_its_caller():
    cell = Cell(nn.Linear(3, 3), Gain(3, 0.5))
    read, past = torch.randn(2, 3), torch.randn(2, 3)
    state = cell(read, couple=partial(add, past))
    torch.testing.assert_close(state, cell.function(read) + 0.5 * past)
    torch.testing.assert_close(cell(read, couple=partial(subtract, state)), past)
    assert torch.equal(cell(read), cell.function(read))


def test_cell_without_gain_rejects_a_coupling():
    with raises_error(ArgumentError, code="conflicting-values", key="couple", names="first column"):
        Cell(nn.Identity(), None)(torch.randn(2, 3), couple=partial(add, torch.randn(2, 3)))


def test_state_dict_names():
    assert list(Cell(nn.Linear(3, 3), Gain(3)).state_dict()) == ["function.weight", "function.bias", "gain.weight"]
    assert list(Cell(nn.Linear(3, 3), FixedGain()).state_dict()) == ["function.weight", "function.bias"]
