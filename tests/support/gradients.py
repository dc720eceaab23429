"""Independent computations of gradients, states, bytes and matrix products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revnets.engine import executor
from revnets.engine.columns import ReversibleColumns
from revnets.engine.graph import STEM

# --------------------------------------------------------------------------------------- gradients


Train = Callable[[ReversibleColumns, Tensor], Sequence[Tensor]]
"""Forward and backward pass; returns results to compare in addition to the gradients."""


class Result(NamedTuple):
    """Results of a training step."""

    outputs: list[Tensor]
    grads: dict[str, Tensor | None]  # of every parameter by name, and of the input as "input"
    buffers: dict[str, Tensor]


def loss_of(levels: Sequence[Tensor]) -> Tensor:
    """Return a loss in which every element of every level has a different weight."""
    return sum(
        (level * torch.linspace(-1, 1, level.numel(), dtype=level.dtype).view_as(level)).sum() for level in levels
    )


def step(
    net: ReversibleColumns,
    x: Tensor,
    memory: str | Sequence[str] | None = None,
    train: Train | None = None,
    autocast: torch.dtype | None = None,
) -> Result:
    """Take one training step without changing the network, from a fixed random state, so that modes can be compared.

    Args:
        memory: Memory modes. Offloaded cells stay unchanged.
        train: Forward and backward pass on a copy of the network. By default that of `loss_of` of all levels.
    """
    with nullcontext(copy.deepcopy(net)) if train else _left_as_it_is(net) as net:
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
        if memory is not None:
            offloaded = net.offloaded
            net.memory, net.offloaded = memory, offloaded
        torch.manual_seed(7)
        if train is None:
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                outputs: Sequence[Tensor] = net(x)
                loss = loss_of(outputs)
            loss.backward()
        else:
            outputs = train(net, x)
        grads = {name: parameter.grad for name, parameter in net.named_parameters()} | {"input": x.grad}
        buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    return Result([output.detach() for output in outputs], grads, buffers)


@contextmanager
def _left_as_it_is(net: ReversibleColumns) -> Iterator[ReversibleColumns]:
    """Start without gradients and undo all changes of a step. Copying deep networks takes longer than a step."""
    parameters, buffers, policy = list(net.parameters()), list(net.buffers()), net.policy
    grads, values = [parameter.grad for parameter in parameters], [buffer.clone() for buffer in buffers]
    net.zero_grad()
    try:
        yield net
    finally:
        net.policy = policy
        with torch.no_grad():
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad
            for buffer, value in zip(buffers, values, strict=True):
                buffer.copy_(value)


def assert_same(result: Result, expected: Result) -> None:
    """Assert that two results are equal bit for bit."""
    for index, (output, other) in enumerate(zip(result.outputs, expected.outputs, strict=True)):
        assert torch.equal(output, other), f"output {index} differs"
    assert result.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        assert _equal(result.grads[name], grad), f"the gradient of {name} differs"
    for name, buffer in expected.buffers.items():
        assert torch.equal(result.buffers[name], buffer), f"buffer {name} differs"


def assert_near(result: Result, expected: Result, **tolerance: float) -> None:
    for output, other in zip(result.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(output, other, **tolerance)
    torch.testing.assert_close(result.grads, expected.grads, **tolerance)
    torch.testing.assert_close(result.buffers, expected.buffers, **tolerance)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


class PlainColumns(ReversibleColumns):
    """The equation of the paper as a loop with ordinary autograd, without the engine."""

    def states(self, x: Tensor) -> list[Tensor]:
        states: list[Tensor] = []
        for node, cell in zip(self.graph.nodes, self.flat(), strict=True):
            state = cell.function(*(x if read == STEM else states[read] for read in node.reads))
            if node.residual is not None:
                state = state + cell.gain() * states[node.residual]
            states.append(state)
        return states

    def forward(self, x: Tensor, *, taps: Sequence[int] = (), **context: Any) -> Any:
        states = self.states(x)
        at = {(node.column, node.level): state for node, state in zip(self.graph.nodes, states, strict=True)}
        last = [at[place] for place in sorted(at)][-self.graph.m :]
        return (last, [at[tap, self.graph.m - 1] for tap in taps]) if taps else last


def plain(net: ReversibleColumns) -> PlainColumns:
    net = copy.deepcopy(net)
    net.__class__ = PlainColumns
    return net


def assert_like_autograd(net: ReversibleColumns, x: Tensor, train: Train | None = None, **near: float) -> Result:
    """Assert that taped modes equal `store` bit for bit, and that `store` agrees with a plain loop in float64."""
    expected = step(net, x, "store", train)
    for memory in ("recompute", "exact"):
        assert_same(step(net, x, memory, train), expected)
    net, x = copy.deepcopy(net).double(), x.detach().double().requires_grad_(x.requires_grad)
    loop = step(plain(net), x, train=train)
    near = near or {"rtol": 1e-9, "atol": 1e-9}
    for memory in ("store", "invert"):
        assert_near(step(net, x, memory, train), loop, **near)
    return expected


# --------------------------------------------------------------------------------------- tape


@contextmanager
def tapes() -> Iterator[list[executor.Tape]]:
    """Collect every tape that the engine creates."""
    started: list[executor.Tape] = []

    class Spy(executor.Tape):
        def __init__(self, *args: Any):
            super().__init__(*args)
            started.append(self)

    original, executor.Tape = executor.Tape, Spy
    try:
        yield started
    finally:
        executor.Tape = original


def rebuilt_states(net: ReversibleColumns, x: Tensor, autocast: torch.dtype | None = None):
    """Return (name, state of forward, state that the tape rebuilds) for each state, last state first."""
    indices = range(len(net.graph.nodes))
    torch.manual_seed(3)
    with tapes() as started, torch.autocast("cpu", autocast) if autocast else nullcontext():
        _, states = executor.run(net.graph, net.flat(), x, net.memory, {}, indices)
    (tape,) = started
    for index in reversed(indices):
        tape.move_to(index)
        for held in tape.window:
            yield net.graph.name(held), states[held].detach(), tape.window[held].tensor


# --------------------------------------------------------------------------------------- counts


MATMULS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "mkldnn_linear"}


WAITS = {"nonzero", "masked_select", "item", "_local_scalar_dense", "is_nonzero", "equal", "unique", "_unique2"}
