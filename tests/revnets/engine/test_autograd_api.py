"""All ways to compute gradients, and all kinds of hooks, match ordinary autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from revnets import plan
from tests.support.gradients import assert_like_autograd, assert_same, loss_of, step
from tests.support.networks import stem_of, token_net

TAPED = ("recompute", "exact")


# --------------------------------------------------------------------------------------- ways to compute gradients


@pytest.mark.parametrize(
    "names", [["cells.2.1.gain.weight"], ["cells.0.0.function.block.1.weight"], ["cells.1.2", "input"]]
)
def test_gradients_of_selected_parameters(names):
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        candidates = dict(net.named_parameters()) | {"input": x}
        chosen = [tensor for name, tensor in candidates.items() if any(name.startswith(part) for part in names)]
        grads = torch.autograd.grad(loss_of(net(x)), chosen)
        assert all(parameter.grad is None for parameter in net.parameters())
        return grads

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize("early_first", [True, False])
def test_disjoint_parts_of_a_graph_in_sequence(early_first):
    """Autograd allows this without retain_graph, because no node runs twice."""
    net = token_net(columns=5, blocks=("mlp", "dropout"))

    def train(net, x):
        levels, (tapped,) = net(x, taps=[1])
        parts = [
            (loss_of([tapped]), [*net.cells[0].parameters(), *net.cells[1].parameters(), x]),
            (loss_of(levels), [*net.cells[2].parameters()]),
        ]
        grads = [torch.autograd.grad(*part, allow_unused=True) for part in parts[:: 1 if early_first else -1]]
        return [grad for part in grads for grad in part if grad is not None]

    assert_like_autograd(net, stem_of(net), train)


def test_backward_with_selected_inputs():
    net = token_net()

    def train(net, x):
        levels = net(x)
        loss_of(levels).backward(inputs=[x, net.cells[1][0].gain.weight])
        return levels

    assert_like_autograd(net, stem_of(net), train)


def test_a_second_backward():
    net = token_net(blocks=("mlp", "dropout", "batchnorm"))

    def train(net, x):
        levels = net(x)
        for level in (levels[0], levels[2]):
            loss_of([level]).backward(retain_graph=True)
        loss_of(levels).backward(retain_graph=True)
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)


def test_two_forwards_before_one_backward():
    net = token_net(blocks=("mlp", "dropout", "batchnorm"))

    def train(net, x):
        first, second = net(x), net(x.flip(0) * 2)
        (loss_of(first) + loss_of(second).square()).backward()
        return [*first, *second]

    assert_like_autograd(net, stem_of(net), train)


def test_backward_passes_in_forward_order():
    net = token_net(blocks=("mlp", "dropout", "batchnorm"))

    def train(net, x):
        passes = [net(x), net(x * 2), net(x * 3)]
        for levels in passes:
            loss_of(levels).backward()
        return [level for levels in passes for level in levels]

    assert_like_autograd(net, stem_of(net), train)


def test_model_applied_to_its_own_output():
    net = token_net(m=2, dims=(5, 5), halve=False, blocks=("mlp", "dropout"))

    def train(net, x):
        levels = net(net(x)[1])
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize("tap", [0, 1, 2, 3])
def test_loss_on_one_intermediate_output(tap):
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        levels, (tapped,) = net(x, taps=[tap])
        loss_of([tapped]).backward()
        return [*levels, tapped]

    assert_like_autograd(net, stem_of(net), train)


def test_loss_on_all_intermediate_outputs():
    """Deep supervision: the sum of one loss per column."""
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        _, tapped = net(x, taps=range(4))
        sum(weight * loss_of([state]).square() for weight, state in enumerate(tapped, 1)).backward()
        return tapped

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_separate_backward_for_each_loss(order):
    net = token_net(columns=3, blocks=("mlp", "dropout"))

    def train(net, x):
        _, tapped = net(x, taps=range(3))
        for tap in order:
            loss_of([tapped[tap]]).backward(retain_graph=True)
        return tapped

    assert_like_autograd(net, stem_of(net), train)


def test_gradient_accumulation():
    net = token_net(blocks=("mlp", "dropout", "batchnorm"))

    def train(net, x):
        outputs = []
        for scale in (1, 2, 3):
            levels = net(x * scale)
            (loss_of(levels) / 3).backward()
            outputs += levels
        return outputs

    assert_like_autograd(net, stem_of(net), train)


def test_several_training_steps():
    net = token_net(blocks=("mlp", "dropout", "batchnorm"), gamma=0.0)

    def train(net, x):
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(net(x)).square().backward()
            optimizer.step()
        return [parameter.clone() for parameter in net.parameters()]

    expected = step(net, stem_of(net), "store", train)
    for memory in TAPED:
        assert_same(step(net, stem_of(net), memory, train), expected)


def test_optimizer_step_in_backward():
    """Each parameter is updated as soon as its gradient is computed, which frees the gradient."""
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in net.parameters()}

        def take_step(parameter: nn.Parameter) -> None:
            optimizers[parameter].step()
            parameter.grad = None

        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(take_step)
        for _ in range(2):
            loss_of(net(x)).backward()
        return list(net.parameters())

    assert_like_autograd(net, stem_of(net), train)


def test_anomaly_detection():
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        with torch.autograd.detect_anomaly(check_nan=True):
            levels = net(x)
            loss_of(levels).backward()
        return levels

    with pytest.warns(UserWarning, match="Anomaly Detection"):
        assert_like_autograd(net, stem_of(net), train)


# --------------------------------------------------------------------------------------- hooks


def test_parameter_and_tensor_hooks():
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        calls = []
        for index, parameter in enumerate(net.parameters()):
            parameter.register_hook(lambda grad, index=index: (calls.append(index), grad * 2)[1])
        x.register_hook(lambda grad: grad.clamp(-1, 1))
        levels, tapped = net(x, taps=[0, 2])
        levels[1].register_hook(lambda grad: grad * 3)
        tapped[0].register_hook(lambda grad: grad - 1)
        levels[0].retain_grad()
        loss_of(levels).backward()
        assert sorted(calls) == list(range(len(calls)))  # each exactly once
        return [*levels, *tapped, levels[0].grad]

    assert_like_autograd(net, stem_of(net), train)


def test_backward_hooks_on_cells():
    net = token_net(columns=3)

    def train(net, x):
        for cell in net.flat():
            cell.register_full_backward_hook(lambda module, into, out: (into[0] * 2, *into[1:]))
            cell.register_full_backward_pre_hook(lambda module, out: (out[0] + 1,))
        levels = net(x)
        loss_of(levels).backward()
        return levels

    expected = step(net, stem_of(net), "store", train)
    for memory in TAPED:
        assert_same(step(net, stem_of(net), memory, train), expected)
    with pytest.raises(AssertionError):  # the hooks had an effect
        assert_same(step(net, stem_of(net)), expected)
    net.flat()[4].register_full_backward_hook(lambda module, into, out: None)  # also with fake tensors
    assert plan(net, stem_of(net), modes=("exact",)).modes[0].kept > 0


def test_module_hooks():
    net = token_net(columns=3)

    def train(net, x):
        seen = []
        for cell in net.flat():
            cell.function.block.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
            cell.function.block.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
            cell.function.register_forward_hook(lambda module, args, output: output.tanh())
        levels = net(x)
        loss_of(levels).backward()
        assert len(seen) == len(net.flat())  # a replay does not run backward hooks
        return [*levels, *seen]

    assert_like_autograd(net, stem_of(net), train)
