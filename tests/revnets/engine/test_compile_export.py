"""Gradients of compiled cells equal those of `store`; the eval model can be compiled, traced and exported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from revnets import ReversibleColumns
from tests.support.gradients import assert_near, assert_same, loss_of, step
from tests.support.networks import cells_net, image_net, stem_of, token_net, tokens
from tests.support.versions import TORCH

TAPED = ("recompute", "exact")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(backend: str, autocast: torch.dtype | None = None):
    """Return a function for `step`: two training steps with compiled cells."""

    def train(net: ReversibleColumns, x: Tensor) -> list[Tensor]:
        torch.compiler.reset()
        net.compile(backend=backend)
        outputs = []
        for scale in (1, 2):
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                levels = net(x * scale)
            loss_of(levels).backward()
            outputs += levels
        return outputs

    return train


def eager(net: ReversibleColumns, x: Tensor) -> list[Tensor]:
    outputs = []
    for scale in (1, 2):
        levels = net(x * scale)
        loss_of(levels).backward()
        outputs += levels
    return outputs


@pytest.mark.parametrize("blocks", [("mlp", "dropout"), ("batchnorm", "inplace")])
def test_compiled_cells(blocks):
    net = token_net(m=2, columns=3, dims=(6, 6), halve=False, blocks=blocks)
    x = stem_of(net)
    expected = step(net, x, "store", compiled("aot_eager"))
    if "dropout" not in blocks:  # compiled code draws random numbers in another order
        assert_near(expected, step(net, x, "store", eager), rtol=1e-4, atol=1e-4)
    for memory in TAPED:
        assert_same(step(net, x, memory, compiled("aot_eager")), expected)


def test_compiled_cells_under_autocast():
    net = token_net(m=2, columns=3, dims=(6, 6), halve=False)
    train = compiled("aot_eager", torch.bfloat16)
    assert_same(step(net, stem_of(net), "exact", train), step(net, stem_of(net), "store", train))


def test_replays_compile_nothing():
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    net = token_net(m=2, columns=3, blocks=("mlp", "batchnorm", "dropout"), memory="exact")
    net.compile(backend=backend)
    levels = net(stem_of(net))
    compiled_in_forward = graphs
    assert compiled_in_forward > 0
    for _ in range(2):
        loss_of(levels).backward()
        levels = net(stem_of(net))
    assert graphs == compiled_in_forward


class Bottleneck(nn.Module):
    """A block with its own `forward`, unlike an `nn.Sequential`."""

    def __init__(self, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, hidden), nn.Linear(hidden, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_all_cells_are_compiled_beyond_the_default_limit():
    graphs = 0

    def backend(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    net = cells_net([Bottleneck(hidden) for hidden in range(1, 11)])
    net.compile(backend=backend)
    net(tokens())
    assert graphs == 10  # the default limit is 8 versions of one code object


def test_cells_compiled_individually():
    """`torch.compile` of a cell's function, and `compile()` of some cells only."""

    def train(net, x):
        torch.compiler.reset()
        net.cells[1][0].function = torch.compile(net.cells[1][0].function, backend="aot_eager")
        net.cells[2][1].compile(backend="aot_eager")
        levels = net(x)
        loss_of(levels).backward()
        return levels

    net = token_net(m=2, columns=3, dims=(6, 6), halve=False)
    expected = step(net, stem_of(net), "store", train)
    for memory in TAPED:
        assert_same(step(net, stem_of(net), memory, train), expected)


def test_cells_compiled_with_inductor():
    net = token_net(m=2, columns=3, dims=(6, 6), halve=False, blocks=("mlp", "attention"))
    x = stem_of(net)
    expected = step(net, x, "store", compiled("inductor"))
    assert_near(expected, step(net, x, "store", eager), rtol=1e-3, atol=1e-3)
    for memory in TAPED:
        assert_same(step(net, x, memory, compiled("inductor")), expected)


class Model(nn.Module):
    def __init__(self, columns: ReversibleColumns):
        super().__init__()
        dims = [cell.gain.weight.numel() for cell in columns.cells[-1]]
        self.stem, self.columns, self.head = nn.Linear(3, dims[0]), columns, nn.Linear(dims[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.columns(self.stem(x))[-1]).mean(1)


@pytest.mark.parametrize("memory", ["store", *TAPED])
def test_whole_model_compiled_for_training(memory):
    model, x = Model(token_net(m=2, columns=2, memory=memory)), torch.randn(2, 2, 3)
    model(x).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager")(x).square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("memory", "dynamic"), [("store", False), ("exact", False), ("exact", True)])
def test_whole_model_compiled_for_inference_is_one_graph(memory, dynamic):
    model, x = Model(token_net(m=2, columns=2, blocks=("mlp", "batchnorm"), memory=memory)).eval(), torch.randn(5, 2, 3)
    compiled_model = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for batch in (x, x[:3]):
            torch.testing.assert_close(compiled_model(batch), model(batch))


@pytest.mark.skipif(TORCH < (2, 14), reason="older versions call a function without Dynamo even with fullgraph=True")
def test_tape_in_a_compiled_graph_raises():
    model = Model(token_net(m=2, columns=3))
    with pytest.raises(Exception, match="_run_taped"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(2, 2, 3))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    memory = ("exact", "invert", "exact")
    model = Model(token_net(m=2, columns=3, blocks=("mlp", "batchnorm", "attention"), memory=memory)).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(3, 2, 3),), dynamic_shapes=({0: batch},), strict=strict)
    for size in (2, 5):
        x = torch.randn(size, 2, 3)
        torch.testing.assert_close(program.module()(x), model(x))


def test_export_of_images_with_intermediate_outputs():
    net = image_net().eval()
    x = stem_of(net, grad=False)
    program = torch.export.export(net, (x,), {"taps": (0, 1)})
    (levels, tapped), (expected, expected_taps) = program.module()(x, taps=(0, 1)), net(x, taps=(0, 1))
    torch.testing.assert_close(levels + tapped, expected + expected_taps)


def test_onnx():
    from onnx.reference import ReferenceEvaluator

    model = Model(token_net(m=2, columns=2, blocks=("mlp", "conv", "attention"))).eval()
    x = torch.randn(2, 2, 3)
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    (output,) = ReferenceEvaluator(program.model_proto).run(None, {program.model_proto.graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_jit_trace():
    model = Model(token_net(columns=3, blocks=("mlp", "batchnorm"))).eval()
    x = torch.randn(2, 4, 3)
    traced = torch.jit.trace(model, (x,))
    torch.testing.assert_close(traced(x * 2), model(x * 2))
