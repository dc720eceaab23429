"""Gradients and rebuilt states of all memory modes, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from revnets import DriftWarning, ReversibleSequence
from tests.support.gradients import assert_near, assert_same, loss_of, plain, rebuilt_states, step, tapes
from tests.support.networks import BLOCKS, STEADY, fixed, image_net, stem_of, token_net

MODES = ("store", "recompute", "invert", "exact")
TAPED = ("recompute", "exact")
LOSSLESS = ("store", "recompute", "exact")
GAINS = (0.05, 0.2, 0.5, 1.0, -0.5)


# ------------------------------------------------------------------------------------------- gradients, bit for bit


@pytest.mark.parametrize("gamma", GAINS)
@pytest.mark.parametrize("columns", [1, 4, 8, 16, 32])
def test_gradients_equal_store(columns, gamma):
    net = token_net(m=3, columns=columns, blocks=STEADY, gamma=gamma, scale=0.7)
    x = stem_of(net)
    expected = step(net, x, "store")
    assert all(grad is not None and grad.isfinite().all() for grad in expected.grads.values())
    for memory in TAPED:
        assert_same(step(net, x, memory), expected)


@pytest.mark.parametrize("gamma", GAINS)
@pytest.mark.parametrize("columns", [1, 4, 7, 13])
def test_gradients_with_random_and_counting_cells_under_autocast(columns, gamma):
    net = token_net(m=4, columns=columns, blocks=list(BLOCKS), gamma=gamma, scale=0.7)
    x = stem_of(net)
    for autocast in (None, torch.bfloat16):
        expected = step(net, x, "store", autocast=autocast)
        for memory in TAPED:
            assert_same(step(net, x, memory, autocast=autocast), expected)


@pytest.mark.parametrize("gamma", [0.2, 0.5])
def test_gradients_of_images(gamma):
    net = image_net(columns=5, gamma=gamma)
    x = stem_of(net)
    for autocast in (None, torch.bfloat16):
        expected = step(net, x, "store", autocast=autocast)
        for memory in TAPED:
            assert_same(step(net, x, memory, autocast=autocast), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradients_in_other_dtypes(dtype):
    net = token_net(columns=6, blocks=("mlp", "inplace"), dtype=dtype)
    x = stem_of(net)
    expected = step(net, x, "store")
    assert expected.outputs[0].dtype == dtype
    for memory in TAPED:
        assert_same(step(net, x, memory), expected)


def test_gradients_with_two_threads():
    """Kernels divide their work by size, equally in the forward pass and in the replay."""
    net = token_net(m=2, columns=6, dims=(128, 96), blocks=("mlp", "attention"))
    x = stem_of(net, batch=64)
    torch.set_num_threads(2)
    expected = step(net, x, "store")
    for memory in TAPED:
        assert_same(step(net, x, memory), expected)


def test_autocast_around_backward_changes_nothing():
    net = token_net(blocks=("mlp", "dropout"))
    x = stem_of(net)

    def train(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            levels = net(x)
            loss_of(levels).backward()
        return levels

    expected = step(net, x, "store", train)
    for memory in TAPED:
        assert_same(step(net, x, memory, train), expected)

    def train_inside_out(net, x):
        levels = net(x)
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(levels).backward()
        return levels

    expected = step(net, x, "store", train_inside_out)
    for memory in TAPED:
        assert_same(step(net, x, memory, train_inside_out), expected)


@pytest.mark.parametrize("reads", [["full"], ["stem", "below"], ["below", "above", "top"], [1, 3], ["stem"], [2]])
def test_gradients_for_any_inputs_of_cells(reads):
    net = token_net(m=4, columns=5, blocks=("mlp", "conv", "droppath"), reads=[reads] * 4)
    x = stem_of(net)
    expected = step(net, x, "store")
    for memory in TAPED:
        assert_same(step(net, x, memory), expected)


def test_sequence_with_fixed_gains_and_an_incomplete_last_column():
    functions = [
        nn.Identity(),
        nn.Identity(),
        *(BLOCKS[name](6) for name in ("mlp", "attention", "mlp", "attention", "mlp")),
    ]
    for gain in (1.0, 0.5):
        net = ReversibleSequence(functions, m=2, gain=gain)
        x = torch.randn(2, 5, 6, requires_grad=True)
        expected = step(net, x, "store")
        for memory in TAPED:
            assert_same(step(net, x, memory), expected)


@pytest.mark.parametrize("memory", MODES)
def test_gradients_equal_a_plain_loop_of_the_equation(memory):
    for net in (token_net(blocks=STEADY, dtype=torch.float64), image_net().double()):
        x = stem_of(net)
        assert_near(step(net, x, memory), step(plain(net), x), rtol=1e-8, atol=1e-8)


def test_invert_drifts_and_exact_does_not():
    net = token_net(columns=16, gamma=0.2)
    x = stem_of(net)
    expected = step(net, x, "store")
    assert_same(step(net, x, "exact"), expected)
    with pytest.warns(DriftWarning):
        drifted = step(net, x, "invert")
    with pytest.raises(AssertionError):
        assert_near(drifted, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("pair", list(itertools.permutations(MODES, 2)), ids="/".join)
def test_every_pair_of_modes_in_one_model(pair):
    net = token_net(m=2, columns=4, blocks=("mlp", "dropout"), dtype=torch.float64)
    x = stem_of(net)
    expected = step(net, x, "store")
    for modes in ((*pair, *pair), (pair[0], pair[0], pair[1], pair[1])):
        result = step(net, x, modes)
        if "invert" in pair:
            assert_near(result, expected, rtol=1e-9, atol=1e-9)
        else:
            assert_same(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_rebuilt_states_of_images(dtype, autocast):
    net = image_net(columns=4, gamma=0.3).to(dtype)
    for name, state, rebuilt in rebuilt_states(net, stem_of(net), autocast):
        assert torch.equal(rebuilt, state), name
        assert rebuilt.stride() == state.stride(), name


def test_non_finite_states_are_rebuilt():
    net = token_net(columns=3)
    x = stem_of(net).detach()
    x[0, 0, 0], x[1, 1, 1] = float("nan"), float("inf")
    x[0, 1] = 1e-42  # denormal
    for name, state, rebuilt in rebuilt_states(net, x.requires_grad_()):
        assert torch.equal(rebuilt.view(torch.int32), state.view(torch.int32)), name


# ------------------------------------------------------------------------------------- finite differences


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("gamma", [0.5, fixed(1.0), fixed(-0.5)], ids=["learned", "one", "negative"])
def test_finite_differences(memory, gamma):
    net = token_net(m=2, columns=2, dims=(3, 2), gamma=gamma, dtype=torch.float64, memory=memory)
    x = stem_of(net, batch=1)
    assert gradcheck(lambda x, *_: tuple(net(x)), (x, *net.parameters()))


@pytest.mark.parametrize("memory", MODES)
def test_finite_differences_of_gradients(memory):
    net = token_net(m=2, columns=2, dims=(2, 3), dtype=torch.float64, memory=memory)
    x = stem_of(net, batch=1)
    assert gradgradcheck(lambda x, *_: tuple(net(x)), (x, *net.parameters()), fast_mode=True)


@pytest.mark.parametrize("memory", TAPED)
def test_gradient_penalty(memory):
    net = token_net(columns=3, blocks=("mlp", "dropout"), dtype=torch.float64)
    x = stem_of(net)

    def train(net, x):
        levels = net(x)
        (slope,) = torch.autograd.grad(loss_of(levels), x, create_graph=True)
        (slope.square().sum() + loss_of(levels)).backward()
        return [*levels, slope]

    assert_same(step(net, x, memory, train), step(net, x, "store", train))


# ------------------------------------------------------------------------------------- passes without a tape


def test_no_tape_without_gradients():
    net = token_net(blocks=list(BLOCKS)).eval()
    x = stem_of(net)
    with tapes() as started:
        expected = net(x)
    assert len(started) == 1
    with tapes() as started:
        with torch.no_grad():
            levels = net(x)
        with torch.inference_mode():
            more = net(x)
        net.memory = "store"
        stored = net(x)
    assert not started
    for others in (levels, more, stored):
        assert all(torch.equal(level, other) for level, other in zip(others, expected, strict=True))


def test_nothing_requires_grad():
    net = token_net().requires_grad_(False)
    levels = net(stem_of(net, grad=False))
    assert not any(level.requires_grad for level in levels)
