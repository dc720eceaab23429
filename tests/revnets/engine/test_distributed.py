"""DDP and FSDP2 on two gloo processes: gradients of `exact` equal those of `store` bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import revnets
from revnets import PlanError, ReplayError, ReversibleColumns, plan
from tests.support.errors import raises_error
from tests.support.gradients import loss_of
from tests.support.networks import token_net
from tests.support.simulated_steps import simulated_once
from tests.support.two_processes import PROCESSES, average_gradients, in_two_processes

TAPED = ("recompute", "exact")

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Model(nn.Module):
    """Stem, columns, head and a loss on the top level, or on a tap, so that later columns are unused."""

    def __init__(self, columns: ReversibleColumns, tap: int | None = None):
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.columns, self.head = nn.Linear(3, 5), columns, nn.Linear(7, 2)
        self.tap = tap

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        top = self.columns(x)[-1] if self.tap is None else self.columns(x, taps=[self.tap])[1][0]
        return self.head(top.to(self.head.weight.dtype)).mean(1)


def model(memory: str, tap: int | None = None, **options) -> Model:
    return Model(token_net(m=2, columns=3, memory=memory, **options), tap)


def batch(rank: int) -> Tensor:
    return torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(100 + rank))


def local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def leftovers(net: nn.Module) -> list[Tensor | None]:
    """Return the local parts of gradients, parameters and buffers."""
    return [
        *(local(parameter.grad) for parameter in net.parameters()),
        *(local(parameter.detach()) for parameter in net.parameters()),
        *net.buffers(),
    ]


def same(ones: list[Tensor | None], others: list[Tensor | None]) -> None:
    for one, other in zip(ones, others, strict=True):
        assert one is other is None or torch.equal(one, other)


def averaged_by_hand(net: nn.Module) -> list[Tensor]:
    """Compute the gradient of the mean loss of both processes in one process, without a wrapper."""
    net = copy.deepcopy(net)
    for rank in range(PROCESSES):
        (loss_of([net(batch(rank))]) / PROCESSES).backward()
    return [parameter.grad for parameter in net.parameters()]


# --------------------------------------------------------------------------------------- DDP


def ddp(rank: int) -> None:
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        for tap in (None, 0) if options else (None,):  # DDP has to know of unused parameters
            results = []
            for memory in ("store", *TAPED):
                torch.manual_seed(rank)
                net = model(memory, tap, blocks=("mlp", "dropout", "batchnorm"))
                net.columns.verify = True
                wrapped = DistributedDataParallel(net, **options)
                optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
                for _ in range(3):
                    optimizer.zero_grad()
                    loss_of([wrapped(batch(rank))]).backward()
                    optimizer.step()
                results.append(leftovers(net))
            same(results[1], results[0])
            same(results[2], results[0])


def ddp_averages(rank: int) -> None:
    for memory in ("store", *TAPED):
        net = model(memory)
        expected = averaged_by_hand(net)
        wrapped = DistributedDataParallel(net)
        with wrapped.no_sync():
            loss_of([wrapped(batch(rank))]).backward()
        unsynced = net.stem.weight.grad.clone()
        loss_of([wrapped(batch(rank))]).backward()
        for parameter, mean in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * mean, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(unsynced, expected[0], rtol=1e-2)  # the processes have different data


def ddp_with_two_forwards(rank: int) -> None:
    results = []
    for memory in ("store", *TAPED):
        torch.manual_seed(rank)
        net = model(memory, blocks=("batchnorm", "dropout"))
        wrapped = DistributedDataParallel(net, broadcast_buffers=False)
        (loss_of([wrapped(batch(rank))]) + loss_of([wrapped(batch(rank) * 2)])).backward()
        results.append(leftovers(net))
    same(results[1], results[0])
    same(results[2], results[0])


def ddp_work(rank: int) -> None:
    ddp(rank)
    ddp_averages(rank)
    ddp_with_two_forwards(rank)


def test_ddp(tmp_path):
    in_two_processes(ddp_work, tmp_path)


# --------------------------------------------------------------------------------------- FSDP2


def shard(net: Model, by: str, **options) -> None:
    """Apply `fully_shard` to each cell, each column, or only the cells and not the model."""
    options["mesh"] = init_device_mesh("cpu", (PROCESSES,))
    for column in net.columns.cells:
        for group in [list(column)] if by == "column" else column:
            fully_shard(group, **options)
    if by != "cells alone":
        fully_shard(net, **options)
    average_gradients(net)


def fsdp(rank: int, by: str, tap: int | None = None, blocks=("mlp", "dropout", "batchnorm"), **options) -> None:
    results = []
    for memory in ("store", *TAPED):
        torch.manual_seed(rank)
        net = model(memory, tap, blocks=blocks)
        net.columns.verify = True
        shard(net, by, **options)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        for _ in range(2):  # the first step determines the gather order, which later steps use
            optimizer.zero_grad()
            loss_of([net(batch(rank)).float()]).backward()
            optimizer.step()
        gradients = [local(parameter.grad) for parameter in net.parameters()]
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
        results.append(leftovers(net))
    same(results[1], results[0])
    same(results[2], results[0])


def fsdp_averages(rank: int) -> None:
    for memory in ("store", *TAPED):
        net = model(memory)
        expected = averaged_by_hand(net)
        shard(net, "cell")
        loss_of([net(batch(rank))]).backward()
        for parameter, mean in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(whole(parameter.grad), mean, rtol=1e-4, atol=1e-4)


def fsdp_step_between(rank: int) -> None:
    net = model("exact")
    shard(net, "cells alone")  # no prefetch, so that an error leaves no gather pending
    optimizer = torch.optim.SGD(net.columns.parameters(), lr=1e-3)
    loss_of([net(batch(rank))]).backward()
    loss = loss_of([net(batch(rank))])
    optimizer.step()
    with raises_error(ReplayError, code="changed-in-place", names="optimizer step"):
        loss.backward()


def fsdp_per_cell(rank: int) -> None:
    for reshard in (True, False):
        fsdp(rank, "cell", reshard_after_forward=reshard)
    fsdp(rank, "cells alone")
    fsdp(rank, "cell", tap=0)
    fsdp_averages(rank)


def fsdp_per_column(rank: int) -> None:
    for reshard in (True, False):
        fsdp(rank, "column", reshard_after_forward=reshard)
    fsdp(rank, "column", tap=0)
    fsdp_step_between(rank)


def fsdp_mixed_precision(rank: int) -> None:
    for policy in (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16),
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32),
    ):
        for by in ("cell", "column", "cells alone"):
            fsdp(rank, by, blocks=("mlp", "dropout"), mp_policy=policy)


@pytest.mark.parametrize("work", [fsdp_per_cell, fsdp_per_column, fsdp_mixed_precision])
def test_fsdp(work, tmp_path):
    in_two_processes(work, tmp_path)


# --------------------------------------------------------------------------------------- a budget


NET = {
    "columns": 4,
    "stem": {"type": "linear", "in_dim": 13},
    "fusion": "linear",
    "levels": [{"dim": 16, "depth": 1, "block": "mlp"}] * 2,
    "head": {"type": "classifier", "num_classes": 5},
}


@simulated_once()
def fsdp_under_a_budget(rank: int) -> None:
    """Ranks with batches of different sizes replay the same cells."""
    samples, other = (400, 300) if rank == 0 else (300, 400)
    request = {"optimizer": "sgd", "ranks": PROCESSES, "sharding": "fsdp"}
    rows = {row.mode: row for row in plan(NET, (400, 13), modes=("store", "exact"), **request).modes}
    budget = (rows["exact"].peak + rows["store"].peak) // 2
    x, results = torch.randn(samples, 13), []
    for memory in ("store", {"budget": budget, "optimizer": "sgd"}):
        torch.manual_seed(0)
        net = revnets.build({**NET, "memory": memory})
        net.head.requires_grad_(False)
        shard(net, "cell")
        loss_of([net(x)]).backward()
        results.append(leftovers(net))
    alone, of_other = (
        plan(net.twin(), (size, 13), modes=(), **request, budget=budget).chosen for size in (samples, other)
    )
    assert alone.extra != of_other.extra
    poorest = max(alone, of_other, key=lambda chosen: chosen.extra)
    assert net.columns.stored == set(poorest.stored)
    assert net.columns.kept == dict(poorest.kept_cells)
    same(*results)


def fsdp_where_nothing_fits(rank: int) -> None:
    """Only one rank finds no plan; the other must not wait for it in backward."""
    request = {"optimizer": "sgd", "ranks": PROCESSES, "sharding": "fsdp"}
    least = plan(NET, (100, 13), modes=("exact",), **request).modes[0].peak
    net = revnets.build({**NET, "memory": {"budget": int(1.1 * least), "optimizer": "sgd"}})
    shard(net, "cells alone")
    with raises_error(PlanError, code="over-budget"):
        net(torch.randn(100 if rank == 0 else 400, 13))


@pytest.mark.parametrize("work", [fsdp_under_a_budget, fsdp_where_nothing_fits])
def test_sharded_ranks_agree_on_a_plan(work, tmp_path):
    in_two_processes(work, tmp_path)
