"""Pipeline stages in one process and over gloo: gradients equal those of the whole model bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn import functional as F

import revnets
from revnets import Cell, Gain, Net, ReversibleColumns, ReversibleSequence, wire
from revnets.engine.errors import ArgumentError
from revnets.engine.graph import STEM
from revnets.engine.pipeline.partition import partition
from revnets.engine.pipeline.stage import ColumnsStage
from revnets.memory.tracker import MemoryTracker, kept_bytes
from tests.support.errors import raises_error
from tests.support.gradients import loss_of
from tests.support.networks import stem_of, token_net
from tests.support.two_processes import in_two_processes

TAPED = ("recompute", "exact")
MODES = ("store", *TAPED)


# --------------------------------------------------------------------------------------- in one process


def send(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what a runtime passes to the next stage: contiguous leaves."""
    assert all(tensor.is_contiguous() for tensor in tensors)
    return [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors]


def run_stages(
    stages: Sequence[ColumnsStage], x: Tensor, loss: Callable[[Any], Tensor], overwrite: bool = False, **options: Any
) -> Tensor:
    """Run forward and backward through stages that exchange only detached tensors."""
    received, sent = [[x]], []
    for stage in stages:
        sent.append(stage(*received[-1], **options if stage.is_first else {}))
        if not stage.is_last:
            received.append(send(sent[-1]))
    if overwrite:
        for tensors in received[1:]:
            for tensor in tensors:
                tensor.data.fill_(torch.nan)
    result = loss(sent[-1])
    result.backward()
    for outputs, leaves in zip(sent[-2::-1], received[:0:-1], strict=True):
        pairs = [(output, leaf.grad) for output, leaf in zip(outputs, leaves, strict=True) if output.requires_grad]
        assert all(grad is None or grad.is_contiguous() for _, grad in pairs)
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
    return result.detach()


def require_equal_to_whole(make: Callable[[], ReversibleColumns], x: Tensor, stages: int, **options: Any) -> None:
    whole, divided = make(), make()
    inputs = [x.detach().requires_grad_() for _ in range(2)]
    torch.manual_seed(11)
    expected = loss_of(whole(inputs[0]))
    expected.backward()
    parts = divided.split(stages, balance="cells")
    assert torch.equal(run_stages(parts, inputs[1], loss_of, seed=11, **options), expected)
    assert torch.equal(inputs[1].grad, inputs[0].grad)
    for (name, parameter), other in zip(divided.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name
    for (name, buffer), other in zip(divided.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("memory", MODES)
@pytest.mark.parametrize("stages", [1, 2, 5])
def test_all_kinds_of_cells(stages, memory):
    blocks = ("dropout", "attention", "batchnorm", "conv", "droppath", "inplace", "mlp")
    net = token_net(blocks=blocks, memory=memory, scale=0.5)
    require_equal_to_whole(lambda: token_net(blocks=blocks, memory=memory, scale=0.5), stem_of(net), stages)


class Transposed(nn.Module):
    """F_t on tokens (B, N, C) whose channels are not contiguous in memory."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear, self.conv = nn.Linear(dim, dim), nn.Conv1d(dim, dim, 3, padding=1)

    def forward(self, *reads: Tensor) -> Tensor:
        x = sum(reads)
        return torch.tanh(self.conv((x + torch.tanh(self.linear(x))).transpose(1, 2))).transpose(1, 2)


def transposed_net(memory: str = "exact") -> ReversibleColumns:
    torch.manual_seed(7)
    functions = [Transposed(17) for _ in range(9)]
    cells = [Cell(function, Gain(17) if t > 2 else None) for t, function in enumerate(functions)]
    return ReversibleSequence(cells, m=3, reads=(1, 2), memory=memory)


@pytest.mark.parametrize("memory", MODES)
def test_columns_that_run_down(memory):
    make = lambda: token_net(columns=5, directions=("up", "down", "down", "up", "down"), memory=memory)  # noqa: E731
    require_equal_to_whole(make, stem_of(make()), 4)
    named = {name for stage in make().split(4) for name, _ in stage.named_parameters()}
    assert named == set(dict(make().named_parameters()))


@pytest.mark.parametrize("memory", MODES)
def test_states_and_gradients_keep_their_strides(memory):
    net, x = transposed_net(), torch.randn(3, 19, 17)
    assert not any(state.is_contiguous() for state in net(x))
    require_equal_to_whole(lambda: transposed_net(memory), x, 3)


def test_verified_stored_and_kept_cells_and_overwritten_buffers():
    make = lambda: _with(token_net(blocks=("dropout",)), verify=True, stored=[4, 7], kept={5: 2, 8: None})  # noqa: E731
    require_equal_to_whole(make, stem_of(make()), 3, overwrite=True)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)

    def forward(self, *reads: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torch.tanh(self.linear(sum(reads)))
        return x if mask is None else x * mask


def test_cells_without_residuals_and_with_keyword_arguments():
    def unreplaced() -> ReversibleColumns:
        torch.manual_seed(0)
        graph = wire(9, 3, [["before"], ["below"], ["below"]], [0, 0, 0])
        return ReversibleColumns(graph, [Cell(Masked(), None) for _ in range(9)])

    x, mask = torch.randn(2, 5), torch.rand(2, 5)
    require_equal_to_whole(unreplaced, x, 4)
    net = unreplaced()
    first, second = net.split(2)
    assert torch.equal(second(*first(x, mask=mask), mask=mask)[-1], net(x, mask=mask)[-1])


def _with(net: ReversibleColumns, **attributes: Any) -> ReversibleColumns:
    for name, value in attributes.items():
        setattr(net, name, value)
    return net


def test_cut_carries_m_states_and_the_stem():
    for columns in (3, 8):
        stages = token_net(m=3, columns=columns).split(columns, balance="cells")
        for stage, following in pairwise(stages):
            first = following.range.start
            assert stage.outgoing == following.incoming == (STEM, first - 3, first - 2, first - 1)
    stages = ReversibleSequence([nn.Linear(5, 5) for _ in range(7)]).split(2, balance="cells")
    assert stages[0].outgoing == (stages[1].range.start - 2, stages[1].range.start - 1)  # no later cell reads the stem


def test_parameters_keep_their_names_and_are_shared():
    net = token_net()
    stages = net.split(4)
    named = {name: parameter for stage in stages for name, parameter in stage.named_parameters()}
    assert named.keys() == dict(net.named_parameters()).keys()
    assert all(parameter is net.get_parameter(name) for name, parameter in named.items())


def test_states_without_gradient_get_none():
    """Frozen first cells, and a loss that does not depend on all states of the last cut."""
    whole, divided = token_net(), token_net()
    for net in (whole, divided):
        for cell in net.flat()[:4]:
            cell.requires_grad_(False)
    x = stem_of(whole, grad=False)
    whole(x)[0].sum().backward()
    run_stages(divided.split(3, balance=[1] * 3 + [0] * 6 + [1, 0, 1]), x, lambda levels: levels[0].sum())
    for (name, parameter), other in zip(divided.named_parameters(), whole.named_parameters(), strict=True):
        expected = other[1].grad
        assert parameter.grad is expected is None or torch.equal(parameter.grad, expected), name


def test_expanded_gradients_and_states_without_gradient():
    """The loss sums the states at the cut, so their gradients have stride 0; the stem is frozen."""
    whole, divided = token_net(), token_net()
    x = stem_of(whole, grad=False)
    sum(level.sum() for level in whole(x)).backward()
    costs = [1.0] * 11 + [11.0]
    run_stages(divided.split(2, balance=costs), x, lambda levels: sum(level.sum() for level in levels))
    for (name, parameter), other in zip(divided.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad), name


def test_random_numbers_depend_on_the_seed_of_the_micro_batch():
    net = token_net(blocks=("dropout",))
    stages, x = net.split(3), stem_of(net, grad=False)

    def outputs(**options: Any) -> Tensor:
        found: Any = [x]
        for stage in stages:
            found = stage(*found, **options if stage.is_first else {})
        return found[-1]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    seeded = [outputs(seed=torch.tensor([3])), outputs(seed=3)]
    assert torch.equal(*seeded)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(outputs(), outputs())
    torch.manual_seed(5)
    torch.randint(2**63 - 1, ())  # exactly one draw per micro-batch
    second = outputs()
    torch.manual_seed(5)
    outputs()
    assert torch.equal(outputs(), second)
    net.eval()
    assert torch.equal(outputs(), net(x)[-1])


def test_bytes_kept_per_micro_batch():
    """`exact` keeps the last states and lost bits, less than one state per cell, and rebuilds received states."""
    net = token_net(m=2, columns=8, dims=(61, 67), halve=False, memory="exact")
    first, second = net.split(2, balance="cells")
    received = send(first(torch.randn(8, 2, 61)))
    states = sum(tensor.nbytes for tensor in received[2:])
    kept = {}
    for memory in MODES:
        second.policy = revnets.MemoryPolicy((memory,) * 8)
        kept[memory] = kept_bytes(second, *received)
    assert states < kept["exact"] < 3 * states < kept["recompute"] < kept["store"]


@pytest.mark.parametrize("memory", MODES)
def test_offloaded_cells_of_a_stage(memory):
    def make() -> ReversibleColumns:
        return _with(token_net(columns=4, memory=memory), stored=[2, 7], offloaded=range(3, 9))

    x = stem_of(make(), 211)
    require_equal_to_whole(make, x, 4)
    received, hosted = [x], []
    for stage in make().split(4, balance="cells"):
        with MemoryTracker() as tracker:
            sent = stage(*received)
            hosted.append(tracker.host > 0)
        received = send(sent) if not stage.is_last else []
    assert hosted == [False, True, True, False]


# --------------------------------------------------------------------------------------- balance


def test_partition_is_optimal():
    generator = torch.Generator().manual_seed(2)
    for stages in range(1, 7):
        costs = torch.randint(0, 9, (7,), generator=generator).tolist()
        found = partition(costs, stages)
        assert [index for part in found for index in part] == list(range(7))

        def largest(cuts: Sequence[int], costs: list[int] = costs) -> int:
            return max(sum(costs[start:end]) for start, end in pairwise((0, *cuts, 7)))

        best = min(largest(cuts) for cuts in combinations(range(1, 7), stages - 1))
        assert largest([part.start for part in found[1:]]) == best
        assert all(part for part in found)


def test_balance_by_flops_and_by_bytes():
    """Two cells with 13 x 13 weights, then cells with 3 products each; the head is as large as all cells."""
    cells: list[nn.Module] = [nn.Linear(13, 13, bias=False) for _ in range(8)]
    net = ReversibleSequence(cells)
    ranges = lambda **options: [(part.range.start, part.range.stop) for part in net.split(2, **options)]  # noqa: E731
    assert ranges() == ranges(balance="cells") == ranges(balance="flops", x=torch.empty(2, 13)) == [(0, 4), (4, 8)]
    head = nn.Linear(13, 13 * 4, bias=False)
    assert ranges(head=head) == [(0, 6), (6, 8)]
    top = nn.Sequential(_Top(), head)
    assert ranges(balance="flops", x=torch.empty(2, 13), head=top) == [(0, 6), (6, 8)]
    stem = nn.Linear(5, 13, bias=False)
    assert ranges(balance="flops", x=torch.empty(2, 5), stem=stem) == [(0, 4), (4, 8)]
    assert net.training
    assert ranges(balance=[9, 1, 1, 1, 1, 1, 1, 1]) == [(0, 1), (1, 8)]


class _Top(nn.Module):
    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        return levels[-1]


@pytest.mark.parametrize(
    ("options", "code", "key"),
    [
        ({"stages": 13}, "out-of-range", "stages"),
        ({"stages": 0}, "out-of-range", "stages"),
        ({"balance": "weight"}, "unknown-choice", "balance"),
        ({"balance": [1.0] * 11}, "wrong-length", "balance"),
        ({"balance": [float("nan")] * 12}, "wrong-length", "balance"),
        ({"balance": "flops"}, "missing-key", "x"),
    ],
)
def test_invalid_options_raise(options, code, key):
    with raises_error(ArgumentError, code=code, key=key):
        token_net().split(**{"stages": 2, **options})


def test_invert_and_pending_budgets_raise():
    net = token_net(memory="invert")
    with raises_error(ArgumentError, code="conflicting-values", key="memory"):
        net.split(2)
    net.memory = "exact"
    revnets.keep_budget(net, "1GiB")
    with raises_error(ArgumentError, code="conflicting-values", key="memory"):
        net.split(2)
    net.memory = "exact"
    with raises_error(ArgumentError, code="wrong-length", key="inputs"):
        net.split(2)[1](torch.empty(2))


# --------------------------------------------------------------------------------------- over gloo


SPEC = {
    "columns": 4,
    "stem": {"type": "patchify", "in_chans": 3, "patch": 2},
    "levels": [
        {"dim": 5, "depth": 1, "block": "convnext", "drop_path": 0.3, "layer_scale": 1.0},
        {"dim": 7, "depth": 1, "block": "convnext", "drop_path": 0.3, "layer_scale": 1.0},
        {"dim": 11, "depth": 1, "block": "convnext", "layer_scale": 1.0},
    ],
    "head": {"type": "classifier", "num_classes": 13},
}
BATCHES, SIZE = 4, 2
"""Micro-batches per update, and images per micro-batch."""


def build(memory: str) -> Net:
    torch.manual_seed(3)
    return revnets.build({**SPEC, "memory": memory})


def images() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(17)
    x = torch.randn(BATCHES * SIZE, 3, 8, 8, generator=generator)
    return x, torch.randint(13, (len(x),), generator=generator), torch.arange(100, 100 + BATCHES)


def of_one_process() -> tuple[Net, list[Tensor]]:
    """Compute gradients and losses with gradient accumulation in `store`."""
    model, losses = build("store"), []
    for x, y, seed in zip(*(part.chunk(BATCHES) for part in images()), strict=True):
        torch.manual_seed(int(seed))
        losses.append(F.cross_entropy(model(x), y))
        losses[-1].backward()
    return model, losses


def of_pipeline(rank: int, memory: str, kind: type, chunks: int = 1) -> tuple[Net, list[Tensor]]:
    """Compute the gradients of this rank's stages, and on the last rank the losses."""
    model, size, losses = build(memory), dist.get_world_size(), []
    parts = model.columns.split(size * chunks, stem=model.stem, head=model.head)
    stages = [
        PipelineStage(parts[index], index, len(parts), torch.device("cpu")) for index in range(rank, len(parts), size)
    ]
    schedule = kind(stages if chunks > 1 else stages[0], BATCHES, loss_fn=F.cross_entropy, scale_grads=False)
    x, y, seeds = images()
    for _ in range(2):  # the second step reuses the receive buffers
        model.zero_grad()
        losses.clear()
        inputs, options = ([x], {"seed": seeds}) if rank == 0 else ([], {})
        schedule.step(*inputs, **options, **({"target": y, "losses": losses} if rank == size - 1 else {}))
    return model, losses


def require_equal(rank: int, memory: str, kind: type, chunks: int = 1) -> None:
    expected, expected_losses = of_one_process()
    model, losses = of_pipeline(rank, memory, kind, chunks)
    theirs = {name: parameter.grad for name, parameter in expected.named_parameters()}
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, grad in own.items():
        assert torch.equal(grad, theirs[name]), (memory, kind, name)
    assert all(map(torch.equal, losses, expected_losses))
    assert len(losses) == (BATCHES if rank == dist.get_world_size() - 1 else 0)
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, list(own))
    assert sorted(name for part in names for name in part) == sorted(theirs)  # each parameter has one owner


def two(rank: int) -> None:
    for memory in MODES:
        require_equal(rank, memory, Schedule1F1B)
    require_equal(rank, "exact", ScheduleGPipe)


def four(rank: int) -> None:
    require_equal(rank, "exact", Schedule1F1B)
    require_equal(rank, "exact", ScheduleInterleaved1F1B, chunks=2)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(("work", "size"), [(two, 2), (four, 4)])
def test_gradients_over_gloo(work, size, tmp_path):
    in_two_processes(work, tmp_path, size)
