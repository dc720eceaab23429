"""What people do around a net: each must go on working, with the gradients of ordinary autograd."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from revnets import ReplayError, ReversibleColumns, ReversibleSequence, wire
from revnets.cell import Cell, Gain
from tests.helpers import (
    BLOCKS,
    Mlp,
    assert_like_autograd,
    assert_near,
    assert_same,
    image_net,
    loss_of,
    stem_of,
    step,
    token_net,
)

TAPED = ("recompute", "exact")


def cells_net(functions: list[nn.Module], m: int = 2, dim: int = 6, **options: Any) -> ReversibleColumns:
    """Every cell reads the one before it; learned gains from the second column on."""
    cells = [Cell(function, Gain(dim) if t >= m else None) for t, function in enumerate(functions)]
    return ReversibleColumns(wire(len(cells), m, [[1]] * m), cells, **options)


def tokens(dim: int = 6) -> Tensor:
    return torch.randn(3, 5, dim, requires_grad=True)


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *reads: Tensor) -> Tensor:
        return self.function(*reads)


# --------------------------------------------------------------------------------------- what is frozen


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


def test_only_gains():
    net = token_net(blocks=("mlp", "conv"))
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("gain" in name)
    assert_like_autograd(net, stem_of(net, grad=False))


def test_frozen_after_the_forward():
    """requires_grad at the time of the forward counts, as in ordinary autograd."""
    net = token_net()

    def train(net, x):
        levels = net(x)
        net.cells[2].requires_grad_(False)
        (grad,) = torch.autograd.grad(loss_of(levels), x)
        return [*levels, grad]

    assert_like_autograd(net, stem_of(net), train)


# --------------------------------------------------------------------------------------- ways to ask for gradients


@pytest.mark.parametrize(
    "names", [["cells.2.1.gain.weight"], ["cells.0.0.function.block.1.weight"], ["cells.1.2", "input"]]
)
def test_gradients_of_chosen_parameters(names):
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        candidates = dict(net.named_parameters()) | {"input": x}
        chosen = [tensor for name, tensor in candidates.items() if any(name.startswith(part) for part in names)]
        grads = torch.autograd.grad(loss_of(net(x)), chosen)
        assert all(parameter.grad is None for parameter in net.parameters())
        return grads

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize("early_first", [True, False])
def test_parts_of_a_graph_one_after_the_other(early_first):
    """No part retains the graph, and none runs a node that another has run: autograd allows it."""
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


def test_backward_into_chosen_inputs():
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


def test_backwards_in_the_order_of_the_forwards():
    net = token_net(blocks=("mlp", "dropout", "batchnorm"))

    def train(net, x):
        passes = [net(x), net(x * 2), net(x * 3)]
        for levels in passes:
            loss_of(levels).backward()
        return [level for levels in passes for level in levels]

    assert_like_autograd(net, stem_of(net), train)


def test_one_net_after_itself():
    net = token_net(m=2, dims=(5, 5), halve=False, blocks=("mlp", "dropout"))

    def train(net, x):
        levels = net(net(x)[1])
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize("tap", [0, 1, 2, 3])
def test_loss_on_one_tap_alone(tap):
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        levels, (tapped,) = net(x, taps=[tap])
        loss_of([tapped]).backward()
        return [*levels, tapped]

    assert_like_autograd(net, stem_of(net), train)


def test_loss_on_every_tap():
    """Deep supervision: one loss a column, summed."""
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        _, tapped = net(x, taps=range(4))
        sum(weight * loss_of([state]).square() for weight, state in enumerate(tapped, 1)).backward()
        return tapped

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_several_losses_one_backward_each(order):
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


def test_training_for_some_steps():
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


def test_optimizer_in_the_backward():
    """Each parameter steps as soon as its gradient is there, which frees the gradient."""
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
        assert sorted(calls) == list(range(len(calls)))  # each of them once
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
    with pytest.raises(AssertionError):  # the hooks did something
        assert_same(step(net, stem_of(net)), expected)


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
        assert len(seen) == len(net.flat())  # a replay is not part of the backward
        return [*levels, *seen]

    assert_like_autograd(net, stem_of(net), train)


# --------------------------------------------------------------------------------------- what cells do


def test_a_cell_that_returns_its_input():
    functions = [nn.Identity(), nn.Identity(), Mlp(6), nn.Identity(), nn.Identity(), Mlp(6), nn.Identity()]
    assert_like_autograd(cells_net(functions), tokens())
    assert_like_autograd(cells_net([nn.Identity()] * 6), tokens())


def test_a_cell_that_returns_a_view_of_its_input():
    flip = Lambda(lambda x: x.transpose(1, 2).transpose(1, 2))
    part = Lambda(lambda x: x[:, :1].expand_as(x))
    assert_like_autograd(cells_net([flip, part, Mlp(6), part, flip, Mlp(6), Mlp(6)]), tokens())


def test_a_cell_without_parameters_and_one_without_gradient():
    functions = [Mlp(6), Mlp(6), nn.Tanh(), Lambda(lambda x: x.detach().sin()), Mlp(6), nn.Tanh()]
    assert_like_autograd(cells_net(functions), tokens())


def test_a_cell_that_uses_its_weight_twice():
    class Twice(nn.Linear):
        def forward(self, x):
            return super().forward(super().forward(x).tanh())

    assert_like_autograd(cells_net([Twice(6, 6) for _ in range(6)]), tokens())


def test_in_place_operations_on_intermediates():
    net = token_net(blocks=("inplace",))
    assert_like_autograd(net, stem_of(net))
    functions = [nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6), nn.Hardswish(inplace=True))]
    assert_like_autograd(cells_net(copy.deepcopy(functions * 6)), tokens())


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_in_place_operation_on_a_read(memory):
    functions = [Mlp(6), Mlp(6), nn.ReLU(inplace=True), Mlp(6)]
    with pytest.raises(ReplayError, match=r"c1\.l0 \(\w+\) changed one of its reads in place"):
        cells_net(functions, memory=["store", memory] if memory != "store" else ["exact", "store"])(tokens())


def test_non_contiguous_inputs():
    net = token_net(blocks=("mlp", "conv", "attention"))
    length, dim = stem_of(net).shape[1:]
    for x in (
        torch.randn(2, dim, length).transpose(1, 2),
        torch.randn(2, length, 2 * dim)[..., ::2],
        torch.randn(length, 2, dim).transpose(0, 1),
        torch.randn(1, 1, dim).expand(2, length, dim),
    ):
        assert not x.is_contiguous()
        assert_like_autograd(net, x.requires_grad_())


def test_an_empty_batch():
    net = token_net(blocks=("mlp", "conv"))
    assert_like_autograd(net, stem_of(net)[:0].detach().requires_grad_())


def test_states_with_permuted_strides():
    flip = [Lambda(lambda x: x.transpose(1, 2)), nn.Linear(5, 5), nn.Tanh(), Lambda(lambda x: x.transpose(1, 2))]
    functions = [nn.Sequential(*copy.deepcopy(flip)) if t % 3 else Mlp(6) for t in range(8)]
    assert_like_autograd(cells_net(functions), tokens())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_images_in_both_memory_formats(memory_format):
    net = image_net()
    images = stem_of(net).detach().permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
    assert_like_autograd(net, images.permute(0, 2, 3, 1).requires_grad_())
    assert_like_autograd(net.to(memory_format=torch.channels_last), images.permute(0, 2, 3, 1).requires_grad_())


def test_batch_norm_moves_once_a_step():
    net = token_net(blocks=("batchnorm",))
    result = assert_like_autograd(net, stem_of(net))
    counts = [buffer for name, buffer in result.buffers.items() if "num_batches" in name]
    assert len(counts) == len(net.flat())
    assert all(count == 1 for count in counts)


def test_batch_norm_in_two_passes():
    """The second pass moves the statistics before the first one is replayed."""
    net = token_net(blocks=("batchnorm",))
    for block in net.modules():
        if isinstance(block, nn.BatchNorm1d):
            block.momentum = None  # cumulative average: the count matters

    def train(net, x):
        first, second = net(x), net(x * 2)
        loss_of(first).backward()
        loss_of(second).backward()
        return [*first, *second]

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize(
    "wrap", [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal]
)
def test_parametrized_weights(wrap):
    """Spectral norm's power iteration writes the buffers that its output depends on."""
    net = cells_net([nn.Sequential(nn.LayerNorm(6), wrap(nn.Linear(6, 6)), nn.GELU()) for _ in range(6)])

    def train(net, x):
        levels = net(x)
        loss_of(levels).backward()
        return [*levels, *net(x)]

    assert_like_autograd(net, tokens(), train)


def test_eval_between_forward_and_backward():
    net = token_net(blocks=("dropout", "batchnorm", "droppath"))

    def train(net, x):
        levels = net(x)
        net.eval()
        loss_of(levels).backward()
        assert not any(module.training for module in net.modules())
        return levels

    assert_like_autograd(net, stem_of(net), train)


def test_gradients_in_eval_mode():
    net = token_net(blocks=("dropout", "batchnorm", "droppath")).eval()

    def train(net, x):
        levels = net(x)
        net.train()
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)


def test_random_numbers_go_on_as_without_a_replay():
    net = token_net(blocks=("dropout", "droppath"))

    def train(net, x):
        levels = net(x)
        noise = [torch.rand(3)]
        loss_of(levels).backward()
        return [*levels, *noise, torch.rand(3), *net(x)]

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoint_inside_a_cell(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=reentrant)

    functions = [Checkpointed(BLOCKS[name](6)) for name in ("mlp", "dropout", "attention")]
    assert_like_autograd(cells_net(copy.deepcopy(functions * 3)), tokens())


def test_saved_tensors_on_the_cpu():
    """Hooks of the user's around the net get what stored columns save, and nothing else."""
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        with save_on_cpu():
            levels = net(x)
            loss = loss_of(levels)
        loss.backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)
    expected = step(net, stem_of(net), "store", train)
    assert_same(step(net, stem_of(net), ["exact", "store", "exact", "store"], train), expected)


def test_backward_in_another_thread():
    net = token_net(blocks=("mlp", "dropout", "batchnorm"))

    def train(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            levels = net(x)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(loss_of(levels).backward).result()
        return levels

    expected = step(net, stem_of(net), "store", train)
    for memory in TAPED:
        assert_same(step(net, stem_of(net), memory, train), expected)


def test_activation_checkpoint_around_the_net():
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        levels = checkpoint(lambda x: net(x * 2), x, use_reentrant=False)
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)


def test_one_module_in_two_cells():
    shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2))
    functions = [Mlp(6), shared, shared, Mlp(6), shared, Mlp(6), shared]
    assert_like_autograd(cells_net(functions), tokens())


def test_one_cell_in_two_places():
    """Weights tied over columns, gain included, as in a recurrent net."""
    start, cells = [Cell(Mlp(6), None) for _ in range(2)], [Cell(BLOCKS["batchnorm"](6), Gain(6)) for _ in range(2)]
    net = ReversibleColumns(wire(8, 2, [[1]] * 2), start + cells * 3)
    assert_like_autograd(net, tokens())


def test_columns_inside_a_cell():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.columns = cells_net([BLOCKS[name](6) for name in ("mlp", "dropout", "mlp", "batchnorm", "mlp")])

        def forward(self, x):
            return self.columns(x)[-1]

    assert_like_autograd(cells_net([Mlp(6), Mlp(6), Inner(), Mlp(6), Inner(), Inner()]), tokens())


def test_arguments_for_every_cell():
    """A mask, a condition that needs a gradient, and a plain number; without a plain loop, which takes none."""

    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, *, mask, condition, scale):
            return (self.linear(x) + condition.tanh() * scale).masked_fill(mask, 0)

    net = cells_net([Conditioned() for _ in range(8)])
    mask = torch.rand(3, 5, 1) < 0.3

    def train(net, x, plainly=False):
        condition = torch.linspace(-1, 1, 6, dtype=x.dtype, requires_grad=True)
        context = {"mask": mask, "condition": condition.sin(), "scale": 0.5}
        if plainly:
            states = []
            for node, cell in zip(net.graph.nodes, net.flat(), strict=True):
                state = cell.function(*(x if read < 0 else states[read] for read in node.reads), **context)
                states.append(state if cell.gain is None else state + cell.gain() * states[node.residual])
            levels = states[-2:]
        else:
            levels = net(x, **context)
        loss_of(levels).backward()
        return [*levels, condition.grad]

    x = tokens()
    expected = step(net, x, "store", train)
    for memory in TAPED:
        assert_same(step(net, x, memory, train), expected)
    loop = step(net.double(), x.double().detach(), train=lambda net, x: train(net, x, plainly=True))
    assert_near(step(net, x.double().detach(), "exact", train), loop, rtol=1e-9, atol=1e-9)


def test_the_condition_alone_needs_a_gradient():
    class Shifted(nn.Module):
        def forward(self, x, *, shift):
            return (x + shift).tanh()

    net = cells_net([Shifted() for _ in range(6)]).requires_grad_(False)
    shift = torch.randn(6, requires_grad=True)
    grads = []
    for memory in ("store", *TAPED):
        net.memory = memory
        grads += torch.autograd.grad(loss_of(net(tokens().detach().fill_(0.3), shift=shift)), shift)
    assert grads[0].abs().sum() > 0
    assert all(torch.equal(grad, grads[0]) for grad in grads)


# --------------------------------------------------------------------------------------- copies


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
    loss_of(net(stem_of(net))).backward()  # moves buffers
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
def test_weights_that_are_passed_in(wrap):
    """functional_call: the weights of the call, not those of the module, are in the gradient and in the replay."""
    net = token_net(blocks=("mlp", "batchnorm"))

    def train(net, x):
        weights = {name: wrap((parameter * 1.1).sin()) for name, parameter in net.named_parameters()}
        levels = torch.func.functional_call(net, weights, (x,))
        grads = torch.autograd.grad(loss_of(levels), [x, *weights.values()])
        assert all(isinstance(parameter, nn.Parameter) for parameter in net.parameters())
        return [*levels, *grads]

    assert_like_autograd(net, stem_of(net), train)


def test_the_weights_of_an_inner_loop():
    """MAML: a step of gradient descent inside of the graph."""
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
    """torch.func knows no saved-tensor hooks: under it every mode computes as `store` does."""
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


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_forward_mode(memory):
    net = token_net(columns=3, blocks=("mlp", "conv"), memory=memory, dtype=torch.float64)
    x = stem_of(net)
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        levels = net(forward_ad.make_dual(x, tangent))
        slopes = [forward_ad.unpack_dual(level).tangent.detach() for level in levels]
    (grad,) = torch.autograd.grad(loss_of(net(x)), x)
    torch.testing.assert_close((grad * tangent).sum(), loss_of(slopes))  # the loss is linear in the levels


def test_a_sequence_of_plain_modules():
    functions = [nn.Identity(), nn.Identity(), *(BLOCKS[name](6) for name in ("mlp", "attention", "mlp", "attention"))]
    assert_like_autograd(ReversibleSequence(functions), tokens())


def test_a_mode_can_change_between_forward_and_backward():
    net = token_net()

    def train(net, x):
        levels = net(x)
        net.memory = "store"
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)
