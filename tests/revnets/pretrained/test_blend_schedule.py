"""The schedule of the blend, and gradients at intermediate blends."""

from __future__ import annotations

import pytest
import torch

import revnets
from revnets.engine.errors import ArgumentError
from tests.support.residual_networks import ResidualNetwork, assert_same_tensors, inputs, training_step


def test_schedule_starts_with_the_original_network():
    model = ResidualNetwork().eval()
    expected = model(inputs())
    revnets.BlendSchedule(revnets.make_reversible(model, 0.5), 7)
    torch.testing.assert_close(model(inputs()), expected)


def test_schedule_reaches_the_target_and_stays_there():
    model = revnets.make_reversible(ResidualNetwork().eval(), 0.5)
    expected = model(inputs())
    schedule = revnets.BlendSchedule(model, 3)
    values = []
    for _ in range(5):
        schedule.step()
        values.append(schedule.value)
    assert values == [0.5 / 3, 1.0 / 3, 0.5, 0.5, 0.5]
    assert torch.equal(model(inputs()), expected)


@pytest.mark.parametrize("update", [0, 1, 5])
def test_gradients_at_intermediate_blends_equal_store(update):
    model = revnets.make_reversible(ResidualNetwork(), 0.5)
    schedule = revnets.BlendSchedule(model, 11)
    for _ in range(update):
        schedule.step()
    expected = training_step(model, inputs(), memory="store")
    assert_same_tensors(training_step(model, inputs(), memory="exact"), expected)


def test_step_before_backward_does_not_change_gradients():
    model = revnets.make_reversible(ResidualNetwork(dropout=0.0), 0.5)
    grads = []
    for mode in ("store", "exact"):
        revnets.find_columns(model).memory = mode
        model.zero_grad()
        schedule = revnets.BlendSchedule(model, 3, blend=0.5)
        schedule.step()
        loss = model(inputs()).square().sum()
        schedule.step()
        loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert_same_tensors(*grads)


def test_schedule_resumes_from_its_state():
    schedule = revnets.BlendSchedule(revnets.make_reversible(ResidualNetwork(), 0.5), 7)
    schedule.step()
    resumed = revnets.BlendSchedule(revnets.make_reversible(ResidualNetwork(), 0.1), 3)
    resumed.load_state_dict(schedule.state_dict())
    schedule.step()
    resumed.step()
    assert resumed.value == schedule.value


@pytest.mark.parametrize("updates", [0, -1, 2.5, True])
def test_invalid_numbers_of_updates_raise(updates):
    with pytest.raises(ArgumentError) as error:
        revnets.BlendSchedule(revnets.make_reversible(ResidualNetwork()), updates)
    assert (error.value.key, error.value.code) == ("updates", "out-of-range")


@pytest.mark.parametrize(
    "state",
    [
        [],
        {},
        {"update": "1"},
        {"update": -1, "updates": 3, "blend": 0.1},
        {"update": 1, "updates": 0, "blend": 0.1},
        {"update": 1, "updates": "3", "blend": 0.1},
    ],
)
def test_invalid_states_raise(state):
    schedule = revnets.BlendSchedule(revnets.make_reversible(ResidualNetwork()), 3)
    with pytest.raises(ArgumentError) as error:
        schedule.load_state_dict(state)
    assert (error.value.key, error.value.code) == ("state", "wrong-format")


def test_model_that_is_not_rewired_raises():
    with pytest.raises(ArgumentError) as error:
        revnets.BlendSchedule(ResidualNetwork(), 3)
    assert (error.value.key, error.value.code) == ("model", "no-columns")


@pytest.mark.parametrize("options", [{"learn_blend": True}, {"rule": "midpoint"}])
def test_unsupported_blends_raise(options):
    with pytest.raises(ArgumentError) as error:
        revnets.BlendSchedule(revnets.make_reversible(ResidualNetwork(), **options), 3)
    assert (error.value.key, error.value.code) == ("model", "conflicting-values")
