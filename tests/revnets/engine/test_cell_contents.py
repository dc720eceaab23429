"""Supported contents of cells: views, buffers, random numbers, checkpoints, nested columns, keyword arguments."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from revnets import ReplayError, ReversibleColumns, wire
from revnets.engine.cell import Cell, Gain
from revnets.memory.tracker import kept_bytes
from tests.support.errors import raises_error
from tests.support.gradients import assert_like_autograd, assert_near, assert_same, loss_of, step
from tests.support.networks import BLOCKS, Mlp, cells_net, image_net, stem_of, token_net, tokens

TAPED = ("recompute", "exact")


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *reads: Tensor) -> Tensor:
        return self.function(*reads)


def test_cell_that_returns_its_input():
    functions = [nn.Identity(), nn.Identity(), Mlp(6), nn.Identity(), nn.Identity(), Mlp(6), nn.Identity()]
    assert_like_autograd(cells_net(functions), tokens())
    assert_like_autograd(cells_net([nn.Identity()] * 6), tokens())


def test_cell_that_returns_a_view_of_its_input():
    flip = Lambda(lambda x: x.transpose(1, 2).transpose(1, 2))
    part = Lambda(lambda x: x[:, :1].expand_as(x))
    assert_like_autograd(cells_net([flip, part, Mlp(6), part, flip, Mlp(6), Mlp(6)]), tokens())


def test_cells_without_parameters_or_without_gradient():
    functions = [Mlp(6), Mlp(6), nn.Tanh(), Lambda(lambda x: x.detach().sin()), Mlp(6), nn.Tanh()]
    assert_like_autograd(cells_net(functions), tokens())


def test_cell_that_uses_its_weight_twice():
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
def test_in_place_operation_on_an_input(memory):
    functions = [Mlp(6), Mlp(6), nn.ReLU(inplace=True), Mlp(6)]
    with raises_error(ReplayError, code="changed-in-place", cell="c1.l0"):
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


def test_empty_batch():
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


def test_batch_norm_statistics_change_once_per_step():
    net = token_net(blocks=("batchnorm",))
    result = assert_like_autograd(net, stem_of(net))
    counts = [buffer for name, buffer in result.buffers.items() if "num_batches" in name]
    assert len(counts) == len(net.flat())
    assert all(count == 1 for count in counts)


def test_batch_norm_in_two_forward_passes():
    """The second pass changes the statistics before the first one is replayed."""
    net = token_net(blocks=("batchnorm",))
    for block in net.modules():
        if isinstance(block, nn.BatchNorm1d):
            block.momentum = None  # a cumulative average depends on the number of calls

    def train(net, x):
        first, second = net(x), net(x * 2)
        loss_of(first).backward()
        loss_of(second).backward()
        return [*first, *second]

    assert_like_autograd(net, stem_of(net), train)


def test_buffer_that_a_later_cell_writes():
    """Cells share a module with a call counter: each reads it, and the next one writes it."""

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

    class Step(nn.Module):
        def __init__(self, shared, writes):
            super().__init__()
            self.shared, self.writes, self.linear = shared, writes, nn.Linear(6, 6)

        def forward(self, x):
            if self.writes:
                self.shared.calls += 1
            return self.linear(x).tanh() * (1 + self.shared.calls.clone())

    shared = Counts()
    net = cells_net([Step(shared, writes=t % 3 == 2) for t in range(8)])
    assert assert_like_autograd(net, tokens()).buffers["cells.0.0.function.shared.calls"] == 2


def test_buffers_of_functional_call():
    net = token_net(blocks=("batchnorm",)).eval()
    others = {name: torch.rand_like(buffer, dtype=torch.float32) + 0.5 for name, buffer in net.named_buffers()}

    def train(net, x):
        levels = functional_call(net, others, (x,))
        loss_of(levels).backward()
        return levels

    expected = step(net, stem_of(net), "store", train)
    for memory in TAPED:
        assert_same(step(net, stem_of(net), memory, train), expected)


@pytest.mark.parametrize(
    "wrap", [parametrizations.spectral_norm, parametrizations.weight_norm, parametrizations.orthogonal]
)
def test_parametrized_weights(wrap):
    """The power iteration of spectral norm writes the buffers that its output depends on."""
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


def test_replays_do_not_advance_random_numbers():
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
    """Custom hooks around the model receive only what stored columns save."""
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


def test_activation_checkpoint_around_the_model():
    net = token_net(blocks=("mlp", "dropout"))

    def train(net, x):
        levels = checkpoint(lambda x: net(x * 2), x, use_reentrant=False)
        loss_of(levels).backward()
        return levels

    assert_like_autograd(net, stem_of(net), train)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_matrices(layout):
    """As in graph networks: a product with an adjacency matrix saves that matrix."""
    dense = torch.eye(5).roll(1, 0)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # CSR is beta in PyTorch
        matrix = dense.to_sparse() if layout == "coo" else dense.to_sparse_csr()

    class Neighbors(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return torch.tanh(matrix @ self.linear(x))

    net, x = cells_net([Neighbors() for _ in range(6)]), torch.randn(5, 6, requires_grad=True)
    expected = step(net, x, "store")
    for memory in TAPED:
        assert_same(step(net, x, memory), expected)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_states(dtype):
    def train(net, x):
        levels = net(x)
        sum(level.abs().square().sum() for level in levels).backward()
        return levels

    functions = [nn.Sequential(nn.Linear(6, 6, dtype=dtype), Lambda(torch.tanh)) for _ in range(8)]
    net, x = cells_net(functions, verify=True), torch.randn(3, 5, 6, dtype=dtype, requires_grad=True)
    expected = step(net, x, "store", train)
    for memory in TAPED:
        assert_same(step(net, x, memory, train), expected)


def test_replay_uses_the_attention_kernels_of_the_forward():
    net = token_net(blocks=("attention",))

    def train(net, x):
        with sdpa_kernel(SDPBackend.MATH):
            levels = net(x)
        loss_of(levels).backward()
        assert torch.backends.cuda.flash_sdp_enabled()
        return levels

    expected = step(net, stem_of(net), "store", train)
    for memory in TAPED:
        assert_same(step(net, stem_of(net), memory, train), expected)


def test_one_module_in_two_cells():
    shared = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.2))
    functions = [Mlp(6), shared, shared, Mlp(6), shared, Mlp(6), shared]
    assert_like_autograd(cells_net(functions), tokens())


def test_one_cell_in_two_columns():
    """Weights and gains shared by columns, as in a recurrent network."""
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


def test_keyword_arguments_of_cells():
    """A mask, a condition that needs a gradient, and a number. The plain loop does not support arguments."""

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


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_keyword_arguments_in_nested_lists(memory):
    """One mask and one condition per level; tensors in nested containers are treated like single tensors."""

    class Scaled(nn.Module):
        def forward(self, x, *, scales):
            return x * scales["all"][0]

    net = cells_net([Scaled() for _ in range(6)], memory=memory).requires_grad_(False)
    x, scale = tokens().detach(), torch.rand(6, requires_grad=True)
    copy = scale.sin()
    kept = kept_bytes(net, x, scales={"all": [copy]})
    assert (kept < 3 * x.nbytes) == (memory == "exact")
    loss = loss_of(net(x, scales={"all": [copy]}))
    assert torch.autograd.grad(loss, scale, retain_graph=True)[0].abs().sum() > 0
    with torch.no_grad():
        copy.zero_()
    of_torch = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with of_torch if memory == "store" else raises_error(ReplayError, code="changed-in-place"):
        loss.backward()


def test_only_a_keyword_argument_needs_a_gradient():
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
