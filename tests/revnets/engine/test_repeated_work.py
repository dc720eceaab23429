"""Work that must not repeat: replays for several reads, side effects of cells, garbage collection."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

import revnets
from revnets import ReversibleSequence
from revnets.memory.tracker import MemoryTracker

TAPED = ("recompute", "exact")


class Product(torch.autograd.Function):
    """x @ weight; its backward reads its saved tensors `reads` times."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, reads: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.reads = reads
        return x @ weight

    @staticmethod
    def backward(ctx, grad: Tensor):
        for _ in range(ctx.reads):
            x, weight = ctx.saved_tensors
        return grad @ weight.T, x.T @ grad, None


class Multiply(nn.Module):
    def __init__(self, reads: int):
        super().__init__()
        self.weight, self.drop, self.reads = nn.Parameter(torch.randn(16, 16) / 4), nn.Dropout(0.3), reads
        self.calls = self.first_calls = 0
        self.totals: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.drop(Product.apply(x, self.weight, self.reads).tanh())
        if not revnets.is_replaying():
            self.first_calls += 1
            self.totals.append(y.sum())
        return y


def multiply(memory: str, reads: int, cells: int = 6) -> tuple[ReversibleSequence, list[Multiply], Tensor]:
    torch.manual_seed(0)
    blocks = [Multiply(reads) for _ in range(cells)]
    return ReversibleSequence(blocks, m=2, memory=memory), blocks, torch.randn(64, 16, requires_grad=True)


@pytest.mark.parametrize("memory", TAPED)
@pytest.mark.parametrize("reads", [1, 2, 5])
def test_reads_of_saved_tensors_share_one_replay(memory, reads):
    results = []
    for mode in ("store", memory):
        net, blocks, x = multiply(mode, reads)
        loss = net(x)[-1].pow(2).sum()
        loss.backward(retain_graph=True)
        results.append([x.grad, *(parameter.grad for parameter in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert [block.calls for block in blocks] == [2] * 6
    loss.backward()  # a second backward replays once more
    assert [block.calls for block in blocks] == [3] * 6


def test_reads_outside_of_backward_share_one_replay():
    net, blocks, x = multiply("exact", 1)
    y = net(x)[-1]
    node = y.grad_fn
    while not hasattr(node, "_saved_result"):
        node = node.next_functions[0][0]
    for _ in range(3):
        assert node._saved_result.shape == (64, 16)
    assert sum(block.calls for block in blocks) == 6 + 1


def test_repeated_reads_keep_no_more_bytes():
    peaks = []
    for reads in (1, 3):
        net, _, x = multiply("exact", reads)
        with MemoryTracker() as tracker:
            net(x)[-1].sum().backward()
        peaks.append(tracker.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("memory", TAPED)
def test_is_replaying(memory):
    reference, stored, x = multiply("store", 1)
    reference(x)[-1].sum().backward()
    net, blocks, x = multiply(memory, 1)
    net(x)[-1].sum().backward()
    assert [block.calls for block in blocks] == [2] * 6
    assert [block.first_calls for block in blocks] == [1] * 6
    assert all(torch.equal(a.totals[0], b.totals[0]) for a, b in zip(blocks, stored, strict=True))
    assert not revnets.is_replaying()


@pytest.mark.parametrize("memory", ["store", "recompute", "exact", "invert"])
def test_steps_create_no_garbage(memory):
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.BatchNorm1d(4)) for _ in range(4)]

    class Masked(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.block = block

        def forward(self, x: Tensor, masks: dict[str, list[Tensor]]) -> Tensor:
            return self.block(x) * masks["all"][0]

    net = ReversibleSequence([Masked(block) for block in blocks], m=2, memory=memory)

    def step() -> None:
        net(torch.randn(4, 4), masks={"all": [torch.ones(4)]})[-1].sum().backward()

    step()
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            step()
        assert gc.collect() == 0
    finally:
        gc.enable()
