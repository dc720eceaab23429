"""Common uses of a whole model: copies, files, weight averages, functional_call, transforms of torch.func."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from revnets import ReversibleSequence
from tests.support.gradients import assert_like_autograd, assert_same, loss_of, step
from tests.support.networks import BLOCKS, stem_of, token_net, tokens

TAPED = ("recompute", "exact")


def test_copies_are_independent():
    net = token_net(memory=["store", "exact", "invert", "recompute"])
    loss = loss_of(net(stem_of(net)))
    twin = copy.deepcopy(net)  # between forward and backward
    assert twin.memory == net.memory
    loss.backward()
    assert all(parameter.grad is None for parameter in twin.parameters())
    assert_same(step(twin, stem_of(net)), step(net, stem_of(net)))


def test_state_dict_round_trip(tmp_path):
    net, other = token_net(blocks=("mlp", "batchnorm"), seed=1), token_net(blocks=("mlp", "batchnorm"), seed=2)
    loss_of(net(stem_of(net))).backward()  # changes buffers
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other.memory = "recompute"
    assert other.load_state_dict(torch.load(tmp_path / "net.pt")) == ([], [])
    net.zero_grad()
    assert_same(step(other, stem_of(net)), step(net, stem_of(net), "store"))


def test_pickled_whole(tmp_path):
    net = token_net(memory="recompute")
    torch.save(net, tmp_path / "net.pt")
    other = torch.load(tmp_path / "net.pt", weights_only=False)
    assert other.memory == net.memory
    assert_same(step(other, stem_of(net)), step(net, stem_of(net)))


def test_exponential_moving_average():
    averages = []
    for memory in ("store", "exact"):
        net = token_net(blocks=("mlp", "batchnorm"), memory=memory)
        average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(net(stem_of(net))).backward()
            optimizer.step()
            average.update_parameters(net)
        averages.append(average.eval()(stem_of(net)))
        assert not torch.equal(averages[-1][0], net.eval()(stem_of(net))[0])
    assert all(torch.equal(one, other) for one, other in zip(*averages, strict=True))


@pytest.mark.parametrize(
    "wrap", [nn.Identity(), lambda weight: nn.Parameter(weight.detach())], ids=["tensor", "parameter"]
)
def test_weights_of_functional_call(wrap):
    """The gradient and the replay use the weights of the call, not those of the module."""
    net = token_net(blocks=("mlp", "batchnorm"))

    def train(net, x):
        weights = {name: wrap((parameter * 1.1).sin()) for name, parameter in net.named_parameters()}
        levels = torch.func.functional_call(net, weights, (x,))
        grads = torch.autograd.grad(loss_of(levels), [x, *weights.values()])
        assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
        return [*levels, *grads]

    assert_like_autograd(net, stem_of(net), train)


def test_weights_of_an_inner_loop():
    """MAML: a step of gradient descent inside the graph."""
    net = token_net(columns=3, gamma=0.8, scale=0.5)

    def train(net, x):
        weights = dict(net.named_parameters())
        for _ in range(2):
            loss = loss_of(torch.func.functional_call(net, weights, (x,)))
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {name: weight - 1e-3 * grad for (name, weight), grad in zip(weights.items(), grads, strict=True)}
        levels = torch.func.functional_call(net, weights, (x,))
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_function_transforms(memory):
    """torch.func does not support saved-tensor hooks, so every mode runs as `store`."""
    net = token_net(columns=3, blocks=("mlp", "conv"), memory=memory)
    x = stem_of(net, grad=False)
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(weights, x):
        return loss_of(torch.func.functional_call(net, weights, (x,)))

    grads = torch.func.grad(loss)(weights, x)
    loss_of(net(x)).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x.unsqueeze(1))
    single = torch.func.grad(loss)(weights, x[:1])
    for name in weights:
        torch.testing.assert_close(per_sample[name][0], single[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", ["invert", "exact"])
def test_ensemble_with_vmap(memory):
    """The drift check of `invert` must skip gains, which have no values under vmap."""
    nets = [token_net(columns=3, memory=memory, seed=seed) for seed in (0, 1)]
    weights, buffers = torch.func.stack_module_state(nets)
    x = stem_of(nets[0], grad=False)
    levels = torch.func.vmap(lambda *state: torch.func.functional_call(nets[0], state, (x,)))(weights, buffers)
    for index, net in enumerate(nets):
        for level, expected in zip(levels, net(x), strict=True):
            torch.testing.assert_close(level[index], expected)


@pytest.mark.parametrize("memory", ["store", *TAPED])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # PyTorch's own use of it
def test_forward_mode(memory):
    net = token_net(columns=3, blocks=("mlp", "conv"), memory=memory, dtype=torch.float64)
    x = stem_of(net)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        levels = net(forward_ad.make_dual(x, tangent))
        slopes = [forward_ad.unpack_dual(level).tangent.detach() for level in levels]
    (grad,) = torch.autograd.grad(loss_of(net(x)), x)
    torch.testing.assert_close((grad * tangent).sum(), loss_of(slopes))  # the loss is linear in the levels


def test_sequence_of_plain_modules():
    functions = [nn.Identity(), nn.Identity(), *(BLOCKS[name](6) for name in ("mlp", "attention", "mlp", "attention"))]
    assert_like_autograd(ReversibleSequence(functions), tokens())


def test_mode_may_change_between_forward_and_backward():
    net = token_net()

    def train(net, x):
        levels = net(x)
        net.memory = "store"
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)
