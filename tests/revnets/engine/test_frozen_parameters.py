"""Gradients of partly frozen models equal those of ordinary autograd."""

from __future__ import annotations

import pytest
import torch

from tests.support.gradients import assert_like_autograd, loss_of
from tests.support.networks import stem_of, token_net


def test_frozen_stem():
    net = token_net(blocks=("mlp", "dropout"))
    result = assert_like_autograd(net, stem_of(net, grad=False))
    assert result.grads.pop("input") is None
    assert all(grad is not None for grad in result.grads.values())


@pytest.mark.parametrize("column", [0, 1, 3])
@pytest.mark.parametrize("grad", [True, False])
def test_frozen_column(column, grad):
    net = token_net(blocks=("mlp", "dropout"))
    net.cells[column].requires_grad_(False)
    result = assert_like_autograd(net, stem_of(net, grad=grad))
    assert all((result.grads[name] is None) == (f"cells.{column}." in name) for name, _ in net.named_parameters())


@pytest.mark.parametrize("columns", [1, 2, 3])
def test_frozen_prefix(columns):
    net = token_net(columns=4, blocks=("mlp", "dropout"))
    net.cells[:columns].requires_grad_(False)
    assert_like_autograd(net, stem_of(net, grad=False))


@pytest.mark.parametrize("grad", [True, False])
def test_all_but_one_cell_frozen(grad):
    net = token_net(columns=4).requires_grad_(False)
    net.cells[1][1].requires_grad_(True)
    assert_like_autograd(net, stem_of(net, grad=grad))


def test_frozen_gains():
    net = token_net(blocks=("mlp", "conv"))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("gain" not in name)
    assert_like_autograd(net, stem_of(net))


def test_only_gains_trainable():
    net = token_net(blocks=("mlp", "conv"))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("gain" in name)
    assert_like_autograd(net, stem_of(net, grad=False))


def test_frozen_after_the_forward_pass():
    """The value of requires_grad in the forward pass applies, as in ordinary autograd."""
    net = token_net()

    def train(net, x):
        levels = net(x)
        net.cells[2].requires_grad_(False)
        (grad,) = torch.autograd.grad(loss_of(levels), x)
        return [*levels, grad]

    assert_like_autograd(net, stem_of(net), train)
