"""Rewired networks with DDP and FSDP2 in two processes: `exact` trains the same weights as `store`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import revnets
from revnets.engine.errors import ArgumentError
from revnets.pretrained.rewired_sequence import rewired_sequences
from tests.support.errors import raises_error
from tests.support.two_processes import PROCESSES, average_gradients, in_two_processes

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


class Block(nn.Module):
    """x + f(x) with dropout, and an additional argument and output as in transformers."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        update = self.mlp(self.norm(x)) * mask
        return x + update, update.detach().square().mean()


class Network(nn.Module):
    """Two stacks of different widths with a projection between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.stem, self.head = nn.Linear(3, 11), nn.Linear(13, 2)
        self.encoder = nn.ModuleList(Block(11) for _ in range(3))
        self.bridge = nn.Linear(11, 13)
        self.decoder = nn.ModuleList(Block(13) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.encoder:
            x, _ = block(x, mask)
        x = self.bridge(x)
        for block in self.decoder:
            x, _ = block(x, mask)
        return self.head(x).mean(1)


Wrap = Callable[[Network, str], nn.Module]
"""Makes a network reversible in this memory mode, and prepares it for two processes."""


def trained(rank: int, wrap: Wrap, memory: str, steps: int = 3) -> list[Tensor]:
    """Return the weights of this process after several updates, full or sharded."""
    model = Network()
    wrapped = wrap(model, memory)
    for sequence in rewired_sequences(model):
        sequence.verify = memory != "store"
    assert len(rewired_sequences(model)) == 2
    before = [_local(parameter).clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    for step in range(steps):
        generator = torch.Generator().manual_seed(PROCESSES * step + rank)
        x, mask = torch.randn(5, 7, 3, generator=generator), torch.rand(5, 7, 1, generator=generator)
        optimizer.zero_grad()
        wrapped(x, mask).square().sum().backward()
        optimizer.step()
    weights = [_local(parameter) for parameter in model.parameters()]
    assert any(not torch.equal(one, other) for one, other in zip(weights, before, strict=True))
    return weights


def _local(parameter: Tensor) -> Tensor:
    parameter = parameter.detach()
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def assert_exact_equals_store(rank: int, wrap: Wrap) -> None:
    expected = trained(rank, wrap, "store")
    for memory in ("recompute", "exact"):
        for one, other in zip(trained(rank, wrap, memory), expected, strict=True):
            assert torch.equal(one, other)


def replicated(**options: Any) -> Wrap:
    def wrap(model: Network, memory: str) -> nn.Module:
        return DistributedDataParallel(revnets.make_reversible(model, 0.3, memory=memory).train(), **options)

    return wrap


def sharded(rewire_last: bool = False, root: MixedPrecisionPolicy | None = None, **options: Any) -> Wrap:
    """Return a function that applies `fully_shard` to every block and the network, before or after rewiring.

    Args:
        root: policy of the network, if it differs from that of the blocks.
    """

    def wrap(model: Network, memory: str) -> nn.Module:
        if not rewire_last:
            revnets.make_reversible(model, 0.3, memory=memory)
        for block in (*model.encoder, *model.decoder):
            fully_shard(block, **options)
        fully_shard(model, **options | ({} if root is None else {"mp_policy": root}))
        average_gradients(model)
        if rewire_last:
            revnets.make_reversible(model, 0.3, memory=memory)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        return model.train()

    return wrap


def ddp(rank: int) -> None:
    for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
        assert_exact_equals_store(rank, replicated(**options))


def fsdp(rank: int) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for rewire_last, reshard in ((False, True), (False, False), (True, True)):
        assert_exact_equals_store(rank, sharded(rewire_last, mesh=mesh, reshard_after_forward=reshard))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    root = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    assert_exact_equals_store(rank, sharded(mesh=mesh, mp_policy=policy, root=root))


def ddp_and_fsdp_agree(rank: int) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    parts = trained(rank, sharded(mesh=mesh), "exact")
    for part, whole in zip(parts, trained(rank, replicated(), "exact"), strict=True):
        mine = whole.chunk(PROCESSES)[rank]
        torch.testing.assert_close(part, mine, rtol=1e-4, atol=1e-6)  # gradients are summed in another order


@needs_gloo
@pytest.mark.parametrize("work", [ddp, fsdp, ddp_and_fsdp_agree])
def test_two_processes(work, tmp_path):
    in_two_processes(work, tmp_path)


@needs_gloo
def test_states_cast_by_fsdp_between_blocks_raise(tmp_path):
    """The float32 output is cast to bfloat16 before the next block, so it is no longer the state."""
    in_two_processes(fsdp_with_casts, tmp_path)


def fsdp_with_casts(rank: int) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    with raises_error(ArgumentError, code="unsupported-block", key="encoder.1", names="output_dtype"):
        trained(rank, sharded(mesh=mesh, mp_policy=policy), "exact")


def test_data_parallel_raises():
    """`nn.DataParallel` calls this method of every module in each forward pass on several devices."""
    model = revnets.make_reversible(Network(), 0.3)
    with raises_error(ArgumentError, code="unsupported-block", key="model"):
        for module in model.modules():
            module._replicate_for_data_parallel()
    for module in revnets.undo_reversible(model).modules():
        module._replicate_for_data_parallel()
