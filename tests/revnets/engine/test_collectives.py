"""Replays of cells that communicate, and of cells whose weights are gathered per call."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import revnets
from revnets import MemoryPolicy, ReplayError, ReversibleColumns, ReversibleSequence, plan
from tests.support.errors import raises_error
from tests.support.gradients import loss_of
from tests.support.networks import stem_of, token_net
from tests.support.two_processes import PROCESSES, in_two_processes

TAPED = ("recompute", "exact")
WIDTH = 7


class AllReduce(torch.autograd.Function):
    """Sums over all ranks, forward and backward."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, grad: Tensor) -> Tensor:
        return AllReduce.forward(_, grad)


class ParallelMlp(nn.Module):
    """An MLP with hidden units divided among ranks (Megatron-LM, section 3) that records when it communicates."""

    def __init__(self, calls: list[tuple[int, bool]], index: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls, self.index = calls, index

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.index, revnets.is_replaying()))
        return torch.tanh(AllReduce.apply(self.outer(torch.relu(self.inner(x)))))


def parallel_net(rank: int, calls: list[tuple[int, bool]], **options: Any) -> ReversibleColumns:
    torch.manual_seed(rank)
    return ReversibleSequence([ParallelMlp(calls, t) for t in range(6)], gain=0.5, **options)


def step(net: ReversibleColumns, size: int = 3) -> list[Tensor | None]:
    x = torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(4))
    loss_of(net(x)).backward()
    return [parameter.grad for parameter in net.parameters()]


def same_order_and_gradients(rank: int) -> None:
    expected = step(parallel_net(rank, [], memory="store"))
    for memory in TAPED:
        calls: list[tuple[int, bool]] = []
        grads = step(parallel_net(rank, calls, memory=memory))
        assert all(map(torch.equal, grads, expected))
        assert calls == [*((t, False) for t in range(6)), *((t, True) for t in range(5, -1, -1))]
        found: list[Any] = [None] * PROCESSES
        dist.all_gather_object(found, calls)
        assert found[0] == found[1]


def stored_cells_do_not_communicate_again(rank: int) -> None:
    calls: list[tuple[int, bool]] = []
    net = parallel_net(rank, calls)
    net.stored = [1, 4]
    expected = step(parallel_net(rank, [], memory="store"))
    assert all(map(torch.equal, step(net), expected))
    assert [t for t, is_replay in calls if is_replay] == [5, 3, 2, 0]


NET = {
    "columns": 3,
    "stem": {"type": "linear", "in_dim": 13},
    "fusion": "linear",
    "levels": [{"dim": 16, "depth": 1, "block": "mlp"}] * 2,
}


def budgets_give_one_plan(rank: int) -> None:
    """Ranks have batches of different sizes; alone, the rank with the smaller batch would store more cells."""
    request = {"optimizer": "sgd", "ranks": PROCESSES, "sharding": "ddp"}
    peaks = [row.peak for row in plan(NET, (400, 13), modes=("exact", "store"), **request).modes]

    def planned(ranks: int | None) -> tuple[MemoryPolicy, float]:
        net = revnets.build({**NET, "memory": {"budget": sum(peaks) // 2, "optimizer": "sgd", "ranks": ranks}})
        loss_of(net(torch.randn(400 - 100 * rank, 13))).backward()
        return net.columns.policy, net.memory_plan.chosen.extra

    found: list[Any] = [None] * PROCESSES
    policy, extra = planned(None)
    dist.all_gather_object(found, policy)
    assert found[0] == found[1]
    assert policy.stored
    assert rank == 0 or planned(1)[1] < extra  # a single rank does not wait for the other one


def work(rank: int) -> None:
    same_order_and_gradients(rank)
    stored_cells_do_not_communicate_again(rank)
    budgets_give_one_plan(rank)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_collectives_inside_cells(tmp_path):
    in_two_processes(work, tmp_path)


# --------------------------------------------------------------------------------------- gathered and released weights


class Partitioned:
    """Weights gathered for a call and for the backward of its output, as in DeepSpeed's ZeRO-3.

    Args:
        modules: modules whose hooks gather and release their weights.
        recurse: whether the weights of submodules are included.
    """

    def __init__(self, modules: Iterable[nn.Module], recurse: bool):
        self.whole: dict[nn.Parameter, Tensor] = {}
        self.grads: dict[nn.Parameter, Tensor] = {}
        for module in modules:
            parameters = list(module.parameters(recurse))
            self.whole |= {parameter: parameter.data for parameter in parameters}
            module.register_forward_pre_hook(partial(self._gather, parameters))
            module.register_forward_hook(partial(self._called, parameters))
            self._release(parameters)
        for parameter in filter(lambda item: item.requires_grad, self.whole):
            parameter.register_post_accumulate_grad_hook(self._keep)

    def _gather(self, parameters: list[nn.Parameter], *_: object) -> None:
        for parameter in parameters:
            parameter.data = self.whole[parameter]

    def _release(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.data = torch.empty(0)

    def _called(self, parameters: list[nn.Parameter], _: nn.Module, __: object, output: Tensor) -> None:
        if not revnets.is_replaying():
            if output.requires_grad:
                output.register_hook(partial(self._gather, parameters))
            self._release(parameters)

    def _keep(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self.grads[parameter], parameter.grad = parameter.grad, None
        self._release([parameter])


def leaves(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if list(module.parameters(recurse=False))]


def make(memory: str) -> ReversibleColumns:
    return token_net(m=2, columns=3, memory=memory, blocks=("mlp", "dropout"))


@pytest.mark.parametrize("memory", TAPED)
@pytest.mark.parametrize(("modules", "recurse"), [(leaves, False), (ReversibleColumns.flat, True)])
def test_weights_released_after_every_call(modules, recurse, memory):
    expected, net = make("store"), make(memory)
    frozen = ("fuse.0", "norm")
    for each in (expected, net):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(not any(part in name for part in frozen))
    partitioned = Partitioned(modules(net), recurse)
    x = stem_of(net)
    for each in (expected, net):
        torch.manual_seed(2)
        loss_of(each(x)).backward()
    for parameter, other in zip(net.parameters(), expected.parameters(), strict=True):
        assert parameter.numel() == 0 or not parameter.requires_grad
        assert (parameter in partitioned.grads) == (other.grad is not None)
        assert other.grad is None or torch.equal(partitioned.grads[parameter], other.grad)


@pytest.mark.parametrize("memory", TAPED)
def test_weights_not_gathered_for_a_replay_raise(memory):
    net = make(memory)
    whole: dict[nn.Parameter, Tensor] = {parameter: parameter.data for parameter in net.parameters()}

    def release(*_: object) -> None:
        for parameter in whole:
            parameter.data = torch.empty(0)

    net.register_forward_hook(release)
    loss = loss_of(net(stem_of(net)))
    with raises_error(ReplayError, code="weights-released"):
        loss.backward()
