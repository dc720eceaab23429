"""Errors of cells and calls that cannot be replayed, with the name of the cell."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from revnets import ReplayError, ReversibleSequence
from revnets.engine.cell import Cell, Gain
from revnets.engine.errors import ArgumentError
from tests.support.errors import raises_error
from tests.support.gradients import loss_of
from tests.support.networks import stem_of, token_net

MODES = ("store", "recompute", "invert", "exact")
TAPED = ("recompute", "exact")


class Fickle(nn.Module):
    """Alternates between two functions."""

    def __init__(self, first, second):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.ways = itertools.cycle([first, second])

    def forward(self, x: Tensor) -> Tensor:
        return next(self.ways)(self.linear(x))


def sequence(cell: nn.Module, memory: str = "exact") -> ReversibleSequence:
    """Return plain cells around cell c1.l0."""
    gain = Gain(4)
    return ReversibleSequence(
        [nn.Linear(4, 4), nn.Linear(4, 4), Cell(cell, gain), nn.Linear(4, 4), nn.Linear(4, 4)], memory=memory
    )


@pytest.mark.parametrize("memory", TAPED)
@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        (torch.sigmoid, lambda x: torch.sigmoid(torch.tanh(x)), " tensors in its forward pass and "),
        (lambda x: torch.sigmoid(x), lambda x: torch.sigmoid(x[:1]).expand(3, 4), ["[3, 4]", "[1, 4]"]),
        (lambda x: torch.sigmoid(x), lambda x: torch.sigmoid(x.t().contiguous().t()), ["(4, 1)", "(1, 3)"]),
        (lambda x: torch.sigmoid(x), lambda x: torch.sigmoid(x.double()).float(), ["float32", "float64"]),
    ],
    ids=["number", "shape", "stride", "dtype"],
)
def test_different_replay_names_the_cell(memory, first, second, names):
    net = sequence(Fickle(first, second), memory)
    loss = loss_of(net(torch.randn(3, 4)))
    with raises_error(ReplayError, code="replay-mismatch", cell="c1.l0", names=names):
        loss.backward()


class Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


@pytest.mark.parametrize("memory", TAPED)
def test_cell_that_changes_its_inputs_raises(memory):
    net = sequence(Writes(), memory)
    with raises_error(ReplayError, code="changed-in-place", cell="c1.l0"):
        net(torch.randn(3, 4))


class Uncoupled(Cell):
    def forward(self, *reads: Tensor, couple=None, **context) -> Tensor:
        return self.function(*reads)


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.filterwarnings("ignore::revnets.DriftWarning")
def test_cell_without_coupling_raises(memory):
    functions = [nn.Linear(4, 4), nn.Linear(4, 4), Uncoupled(nn.Linear(4, 4), Gain(4)), nn.Linear(4, 4)]
    net = ReversibleSequence(functions, memory=["exact", memory] if memory == "store" else memory)
    with raises_error(ReplayError, code="not-coupled", cell="c1.l0", names=["c1.l0 (Linear)", "`couple`"]):
        net(torch.randn(3, 4))


class ChangesSavedTensor(nn.Module):
    """Changes a saved tensor in place: an error in ordinary autograd, too."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid().mul_(2)


@pytest.mark.parametrize("memory", [*TAPED, "store"])
def test_cell_that_changes_its_saved_tensors_raises(memory):
    loss = loss_of(sequence(ChangesSavedTensor(), memory)(torch.randn(3, 4, requires_grad=True)))
    of_torch = pytest.raises(RuntimeError, match="modified by an inplace operation")
    of_replay = raises_error(ReplayError, code="changed-in-place", cell="c1.l0")
    with of_torch if memory == "store" else of_replay:
        loss.backward()


@pytest.mark.parametrize("memory", MODES)
def test_update_of_another_shape_raises(memory):
    with raises_error(ArgumentError, code="shape-mismatch", key="c1.l0", names=["c1.l0", "(3, 5)", "(3, 4)"]):
        sequence(nn.Linear(4, 5), memory)(torch.randn(3, 4))
    with raises_error(ArgumentError, code="shape-mismatch", key="c1.l0", names=["c1.l0", "(3, 1)", "(3, 4)"]):
        sequence(nn.Linear(4, 1), memory)(torch.randn(3, 4))


@pytest.mark.parametrize("hook", [lambda module, args, state: state * 2, lambda module, args, state: state.mul_(2)])
@pytest.mark.parametrize("memory", TAPED)
def test_hook_after_the_coupling_raises(memory, hook):
    net = token_net(memory=memory)
    net.cells[1][1].register_forward_hook(hook)
    with raises_error(ReplayError, code="output-changed", cell="c1.l1", names="`cell.function`"):
        net(stem_of(net))


@pytest.mark.parametrize("memory", TAPED)
def test_output_changed_in_place_raises(memory):
    net = token_net(memory=memory)
    levels = net(stem_of(net))
    loss = loss_of(levels)
    with torch.no_grad():
        levels[1].mul_(2)
    with raises_error(ReplayError, code="changed-in-place", names="c3.l1"):
        loss.backward()


@pytest.mark.parametrize("memory", TAPED)
def test_input_changed_in_place_raises(memory):
    net = token_net(memory=memory)
    x = stem_of(net, grad=False)
    loss = loss_of(net(x))
    x.mul_(2)
    with raises_error(ReplayError, code="changed-in-place", names="the stem"):
        loss.backward()


@pytest.mark.parametrize("memory", TAPED)
def test_optimizer_step_before_backward_raises(memory):
    net = token_net(memory=memory)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss_of(net(stem_of(net))).backward()
    loss = loss_of(net(stem_of(net)))
    optimizer.step()
    with raises_error(ReplayError, code="changed-in-place", names=["optimizer step", "backward()"]):
        loss.backward()


@pytest.mark.parametrize("memory", TAPED)
def test_buffer_changed_before_backward_raises(memory):
    """A forward pass in training mode changes the statistics that an earlier one in eval mode used."""
    net = token_net(blocks=("batchnorm",), memory=memory)
    loss = loss_of(net.eval()(stem_of(net)))
    net.train()(stem_of(net))
    with raises_error(ReplayError, code="changed-in-place", names=["num_batches_tracked", "BatchNorm1d", "backward()"]):
        loss.backward()


@pytest.mark.parametrize("memory", TAPED)
def test_optimizer_step_between_two_backward_passes_raises(memory):
    net = token_net(memory=memory)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    levels = net(stem_of(net))
    loss_of(levels[-1:]).backward(retain_graph=True)
    optimizer.step()
    with raises_error(ReplayError, code="changed-in-place"):
        loss_of(levels).backward()


@pytest.mark.parametrize("memory", TAPED)
def test_optimizer_step_during_the_backward_of_a_cell_raises(memory):
    net = token_net(memory=memory).requires_grad_(False)
    net.flat()[-1].requires_grad_(True)  # no other cell is replayed
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = loss_of(net(stem_of(net, grad=False)))
    net.flat()[-1].gain.weight.grad = torch.autograd.grad(loss, net.flat()[-1].gain.weight, retain_graph=True)[0]
    net.flat()[-1].function.block[1].weight.grad = torch.ones_like(net.flat()[-1].function.block[1].weight)
    optimizer.step()
    with raises_error(ReplayError, code="changed-in-place"):
        loss.backward()


@pytest.mark.parametrize("memory", MODES)
def test_second_backward_needs_retain_graph(memory):
    net = token_net(memory=memory)
    loss = loss_of(net(stem_of(net)))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


class TakesGradient(nn.Linear):
    """Runs a backward in its forward, as in networks for energies and forces."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x).tanh()
        return y + torch.autograd.grad(y.sum(), self.weight, create_graph=True)[0].sum()


@pytest.mark.parametrize("memory", TAPED)
def test_backward_inside_a_cell_raises(memory):
    net = sequence(TakesGradient(4, 4), memory)
    with raises_error(ReplayError, code="early-replay", cell="c1.l0", names="memory='store'"):
        net(torch.randn(3, 4))
    net.stored = [2]  # as the error suggests
    loss_of(net(torch.randn(3, 4))).backward()


@pytest.mark.parametrize("memory", TAPED)
def test_backward_after_an_interrupted_forward_raises(memory):
    """Some tools read a state in a hook and stop there with an exception."""

    def stop(module, args, state):
        states.append(state)
        raise StopIteration

    net, states = sequence(nn.Linear(4, 4), memory), []
    net.flat()[3].register_forward_hook(stop)
    with pytest.raises(StopIteration):
        net(torch.randn(3, 4))
    with raises_error(ReplayError, code="early-replay", names=["an exception", "memory='store'"]):
        states[0].sum().backward()


@pytest.mark.parametrize("memory", TAPED)
def test_lazy_weights_raise(memory):
    net = sequence(nn.LazyLinear(4), memory)
    with raises_error(ArgumentError, code="invalid-value", key="LazyLinear", names=["LazyLinear", "torch.no_grad()"]):
        net(torch.randn(3, 4))
    with torch.no_grad():
        net(torch.randn(3, 4))
    loss_of(net(torch.randn(3, 4))).backward()


@pytest.mark.parametrize("memory", TAPED)
def test_input_of_inference_mode_raises(memory):
    with torch.inference_mode():
        x = torch.randn(3, 4)
    net = sequence(nn.Linear(4, 4), memory)
    with raises_error(ArgumentError, code="invalid-value", key="x", names=["inference_mode", "clone()"]):
        net(x)
    loss_of(net(x.clone())).backward()


def test_invalid_modes_and_taps_raise():
    net = token_net(columns=3)
    with raises_error(
        ArgumentError,
        code="unknown-choice",
        key="memory",
        names=["'fast'", "store, recompute, invert, exact"],
    ):
        net.memory = "fast"
    with raises_error(ArgumentError, code="unknown-choice", key="memory", names="None"):
        net.memory = None
    with raises_error(ArgumentError, code="wrong-length", key="memory", names=["2", "3 columns"]):
        net.memory = ["store", "exact"]
    with raises_error(ArgumentError, code="out-of-range", key="taps", names=["column 3", "0 to 2"]):
        net(stem_of(net), taps=[3])
    with raises_error(ArgumentError, code="wrong-length", key="levels", names=["2 states", "last 3"]):
        net.inverse(net(stem_of(net))[:2], stem_of(net))
