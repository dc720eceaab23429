"""Update rules compared with their equations, and their gradients with ordinary autograd."""

from __future__ import annotations

import itertools

import pytest
import torch

import revnets
from revnets.pretrained.update_rules import RULES
from tests.support.residual_networks import ResidualNetwork, assert_same_tensors, inputs, training_step

EQUATIONS = {  # x_t from x_{t-1}, f(x_{t-1}), x_{t-2} and the parameter, as in the papers
    "blend": lambda x, f, past, b: f + (1 - b) * x + b * past,
    "midpoint": lambda x, f, past, h: past + 2 * h * f,
    "leapfrog": lambda x, f, past, h: 2 * x - past + h**2 * f,
    "momentum": lambda x, f, past, g: x + g * (x - past) + (1 - g) * f,
    "bdia": lambda x, f, past, _: x + f,
    "meft": lambda x, f, past, b: x + f + b * past,
}


def test_every_rule_has_an_equation():
    assert set(EQUATIONS) == set(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_evaluation_follows_the_equation(rule):
    model = ResidualNetwork().eval()
    past = now = model.stem(inputs())
    for layer in model.layers:
        past, now = now, EQUATIONS[rule](now, layer(now) - now, past, 0.4)
    expected = model.head(now.mean(1))
    torch.testing.assert_close(revnets.make_reversible(model, 0.4, rule=rule)(inputs()), expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_equal_store_bit_for_bit(rule, autocast):
    model = revnets.make_reversible(ResidualNetwork(depth=11), 0.4, rule=rule)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = training_step(model, inputs(), memory="store")
        assert_same_tensors(training_step(model, inputs(), memory="exact"), expected)


def test_bdia_draws_one_sign_per_sample_and_block():
    model = ResidualNetwork(depth=3, dropout=0.0)
    paths = []
    for signs in itertools.product((-0.4, 0.4), repeat=3):
        past = now = model.stem(inputs())
        for layer, g in zip(model.layers, signs, strict=True):
            past, now = now, g * past + (1 - g) * now + (1 + g) * (layer(now) - now)
        paths.append(model.head(now.mean(1)))
    revnets.make_reversible(model, 0.4, rule="bdia")
    seen = set()
    for _ in range(50):
        for sample, output in enumerate(model(inputs())):
            (path,) = (index for index, path in enumerate(paths) if torch.allclose(path[sample], output, atol=1e-5))
            seen.add((sample, path))
    assert len(seen) == 3 * 8


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "bdia"])
def test_learned_parameters_of_all_rules(rule):
    model = revnets.make_reversible(ResidualNetwork(), 0.4, rule=rule, learn_blend=True)
    expected = training_step(model, inputs(), memory="store")
    assert_same_tensors(training_step(model, inputs(), memory="exact"), expected)
