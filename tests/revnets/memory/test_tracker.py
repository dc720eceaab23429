from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from revnets.memory.tracker import MemoryTracker, OpCounter, kept_bytes, peak_bytes, tensors

FLOAT = 4  # bytes


def test_product_counts_only_its_result():
    x, w = torch.randn(3, 5), torch.randn(5, 7)
    with MemoryTracker() as tracker:
        y = x @ w
        assert tracker.live == tracker.peak == 3 * 7 * FLOAT
        del y
        assert tracker.live == 0
    assert tracker.peak == 3 * 7 * FLOAT


def test_views_and_in_place_operations_add_nothing():
    x = torch.randn(3, 5)
    with MemoryTracker() as tracker:
        x.view(5, 3).t()[1:].mul_(2)
        assert tracker.live == 0  # of an existing tensor
        y = x + 1
        z = y.view(15)[3:].expand(2, 12)
        y.relu_()
        assert tracker.live == 15 * FLOAT
        del y
        assert tracker.live == 15 * FLOAT  # the whole storage while one view is alive
        del z
        assert tracker.live == 0


def test_dropped_intermediates_count_only_in_the_peak():
    x = torch.randn(11, 13)
    with MemoryTracker() as tracker, torch.no_grad():
        y = x + 1  # 1
        y = y * 2  # 2, then 1
        y = torch.cat([y, y]) + 0.5  # 1 + 2 + 2, then 2
    assert tracker.live == 2 * 11 * 13 * FLOAT
    assert tracker.peak == 5 * 11 * 13 * FLOAT
    assert y.shape == (22, 13)


def test_forward_keeps_what_autograd_saves():
    # Each relu saves its result, and each product its operands. Of these, results of relus and the last sum are new.
    x, weights = torch.randn(17, 5), [torch.randn(5, 5, requires_grad=True) for _ in range(3)]
    with MemoryTracker() as tracker:
        y = x
        for weight in weights:
            y = (y @ weight).relu()
        loss = y.sum()
        del y
        assert tracker.live == (3 * 17 * 5 + 1) * FLOAT
        loss.backward()
        del loss
        assert tracker.live == 3 * 5 * 5 * FLOAT  # the gradients
    weights.clear()
    del weight
    assert tracker.live == 0  # freed storages are also subtracted after the block


def test_snapshot_has_the_peak_since_the_previous_one():
    with MemoryTracker() as tracker:
        x = torch.ones(100)
        tracker.snapshot("many")
        del x
        tracker.snapshot("dropped")
        y = torch.ones(3)
        tracker.snapshot("few")
    assert [(live, peak) for _, live, peak in tracker.snapshots] == [(400, 400), (0, 400), (12, 12)]
    assert tracker.peak == 400
    assert y.numel() == 3


def test_bytes_count_under_the_label_at_creation():
    with MemoryTracker() as tracker:
        tracker.label = "a"
        x = torch.ones(2)
        tracker.label = "b"
        y = x + 1
        x.resize_(5)
    assert tracker.live_by_label == {"a": 5 * FLOAT, "b": 2 * FLOAT}
    del y
    assert tracker.live_by_label["b"] == 0


def test_peak_of_a_backward_chain():
    # z = a * w, y = z * z. Alive at most: z, the gradient of y, 2 z, and their product.
    a, w = torch.randn(101), torch.randn(101, requires_grad=True)
    with MemoryTracker() as tracker:
        y = (a * w).square()
        tracker.snapshot("forward")
        (grad,) = torch.autograd.grad(y, w, torch.ones(101))
        tracker.snapshot("backward")
    forward, backward = tracker.snapshots
    assert forward.live == forward.peak == 2 * 101 * FLOAT  # z, y
    # y, z and the ones; then z ** 1 and 2 z for the gradient of z
    assert backward.peak == tracker.peak == 6 * 101 * FLOAT
    assert backward.live == 2 * 101 * FLOAT  # y and the gradient
    assert grad.shape == (101,)


class _Roomy(torch.autograd.Function):
    """The identity, with a backward that allocates and drops 1000 bytes."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        torch.empty(1000, dtype=torch.uint8)
        return grad


def test_allocations_in_backward_count():
    x = torch.randn(10, requires_grad=True)
    seed = torch.ones(10)
    with MemoryTracker() as tracker:
        y = _Roomy.apply(x)
        before = tracker.live
        y.backward(seed)
        assert before == 10 * FLOAT
        assert tracker.peak == 10 * FLOAT + 1000


def test_allocations_in_saved_tensor_hooks_count():
    # Hooks convert saved tensors to half precision, and back in backward.
    x = torch.randn(64, requires_grad=True)
    with MemoryTracker() as tracker, saved_tensors_hooks(torch.Tensor.half, torch.Tensor.float):
        y = x.exp()
        assert tracker.live == 64 * (FLOAT + 2)
        y.backward(y.detach())
        # y, its packed copy, the unpacked one, and the gradient
        assert tracker.peak == 64 * (3 * FLOAT + 2)
        del y
        assert tracker.live == 64 * FLOAT


def test_registered_values_count_once():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    parameters = 3 * 5 + 5 + 5 + 5
    buffers = (5 + 5) * FLOAT + 8
    model(torch.randn(4, 3)).sum().backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    tracker = MemoryTracker()
    tracker.register(model, model[0].weight, model[0].weight.view(-1))
    assert tracker.live == 2 * parameters * FLOAT + buffers  # with the gradients
    tracker.register(optimizer, [torch.ones(0)])
    assert tracker.live == tracker.peak == 3 * parameters * FLOAT + buffers
    optimizer.zero_grad()
    del optimizer
    gc.collect()  # an optimizer is part of a cycle
    assert tracker.live == parameters * FLOAT + buffers


def test_resized_storages_count_with_their_new_size():
    old, empty = torch.empty(7), torch.empty(0)
    original = torch.UntypedStorage.resize_
    with MemoryTracker() as tracker:
        x = torch.empty(10)
        x.resize_(100)
        assert tracker.live == 100 * FLOAT
        x.untyped_storage().resize_(0)  # no operator
        assert tracker.live == 0
        x.untyped_storage().resize_(30)
        assert tracker.live == 30
        old.untyped_storage().resize_(8)  # new memory for an old storage
        assert tracker.live == 30 + 8
        torch.mul(torch.ones(4), 2, out=empty)
        assert tracker.live == 30 + 8 + 4 * FLOAT
        del x
        assert tracker.live == 8 + 4 * FLOAT
    assert torch.UntypedStorage.resize_ is original
    assert tracker.peak == 100 * FLOAT


def test_tensors_from_python_numbers_and_sparse_tensors_count():
    embedding = nn.Embedding(11, 3, sparse=True)
    with MemoryTracker() as tracker:
        index = torch.tensor([1, 2, 5])
        assert tracker.live == 3 * 8
        embedding(index).sum().backward()
        assert embedding.weight.grad.is_sparse
        values, places = 3 * 3 * FLOAT, 3 * 8
        assert tracker.live == 3 * 8 + values + places


def test_trackers_nest_and_continue_when_entered_again():
    with MemoryTracker() as outer:
        x = torch.ones(10)
        with MemoryTracker() as inner:
            y = torch.ones(5)
            y.untyped_storage().resize_(8)
        z = torch.ones(3)
    assert inner.live == 8
    assert inner.peak == 5 * FLOAT
    assert outer.live == 13 * FLOAT + 8
    unseen = torch.ones(100)
    del x
    with outer:
        more = torch.ones(2)
        assert outer.live == 5 * FLOAT + 8
    assert [tensor.numel() for tensor in (y, z, unseen, more)] == [5, 3, 100, 2]


def _training_step() -> list:
    """Train a small network of convolution and attention for one step; return the snapshots of the tracker."""
    with MemoryTracker() as tracker:
        model = nn.Sequential(
            nn.Conv2d(3, 16, 4, 4),
            nn.GELU(),
            nn.Flatten(2),
            nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True),
            nn.LayerNorm(16),
        )
        optimizer = torch.optim.AdamW(model.parameters())
        tracker.snapshot("model")
        loss = model(torch.randn(2, 3, 16, 16)).square().mean()
        tracker.snapshot("forward")
        loss.backward()
        tracker.snapshot("backward")
        optimizer.step()
        tracker.snapshot("step")
        optimizer.zero_grad()
        tracker.snapshot("zero_grad")
    return tracker.snapshots


def test_fake_tensors_count_like_real_ones():
    real = _training_step()
    with FakeTensorMode():
        assert _training_step() == real
    assert len({snapshot.live for snapshot in real}) == len(real)


def test_tracker_around_fake_mode_counts_the_same():
    with MemoryTracker() as tracker, FakeTensorMode():
        y = torch.randn(3, 5) @ torch.randn(5, 7)
    assert tracker.live == 3 * 7 * FLOAT
    assert tracker.peak == (3 * 5 + 5 * 7 + 3 * 7) * FLOAT
    assert y.shape == (3, 7)


def test_meta_tensors_count():
    with MemoryTracker() as tracker:
        y = torch.empty(1 << 20, 1 << 20, device="meta") * 2
        assert tracker.live == (1 << 40) * FLOAT
        del y


def test_kept_bytes_equal_allocations_of_the_profiler():
    # An independent measurement: the profiler of PyTorch adds up what the CPU allocator allocates and frees.
    model = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
    )
    x = torch.randn(3, 13, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        output = model(x)
    allocated = sum(event.self_cpu_memory_usage for event in profile.events())
    assert output.shape == (3, 13, 32)
    assert kept_bytes(model, x) == allocated > 0


def test_kept_bytes_exclude_parameters_and_inputs():
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
    x = torch.randn(3, 5)
    assert kept_bytes(model, x) == 3 * (7 + 2) * FLOAT  # result of the relu and output; the first product is freed
    with torch.no_grad():
        assert kept_bytes(model, x) == 3 * 2 * FLOAT


def test_peak_bytes_does_not_change_gradients():
    model = nn.Linear(5, 7, bias=False)
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    model.register_parameter("frozen", frozen)
    x = torch.randn(3, 5)
    model.weight.grad = old = torch.randn(7, 5)
    assert peak_bytes(model, x) == (3 * 7 + 5 * 7) * FLOAT  # output and gradient
    assert model.weight.grad is old
    assert peak_bytes(model, x.requires_grad_()) == (3 * 7 + 5 * 7 + 3 * 5) * FLOAT
    assert x.grad is None


def test_tracker_does_not_change_results():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1)
    x = torch.randn(3, 2, 8)
    torch.manual_seed(1)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    torch.manual_seed(1)
    with MemoryTracker(), OpCounter():
        actual = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_op_counter_counts_calls_and_flops():
    layer, x = nn.Linear(5, 7), torch.randn(3, 5)
    with OpCounter() as forward:
        loss = layer(x).sum()
    assert forward.ops["aten.addmm"] == 1
    assert forward.matmuls == 1
    assert forward.flops == 2 * 3 * 5 * 7
    with OpCounter() as backward:
        loss.backward()
    assert backward.ops["aten.mm"] == 1  # gradient of the weight; the input needs none
    assert backward.matmuls == 1
    assert backward.flops == 2 * 3 * 5 * 7


@pytest.mark.parametrize("fake", [False, True])
def test_op_counter_supports_convolution_and_attention(fake):
    def run() -> OpCounter:
        convolution = nn.Conv2d(3, 5, 2, bias=False)
        with OpCounter() as counter:
            image = torch.ones(1, 3, 8, 8, requires_grad=True)
            convolution(image).sum().backward()
            query = torch.ones(2, 3, 7, 8, requires_grad=True)
            F.scaled_dot_product_attention(query, query, query).sum().backward()
        return counter

    if fake:
        with FakeTensorMode():
            counter = run()
    else:
        counter = run()
    convolution = 2 * (7 * 7 * 5) * (3 * 2 * 2)
    attention = 2 * (2 * 2 * 3 * 7 * 7 * 8)  # queries by keys, weights by values
    assert counter.matmuls == 4
    # Backward of a convolution has two products, that of attention five, because it recomputes the weights.
    assert counter.flops == 3 * convolution + attention + attention // 2 * 5
    assert not any(name.startswith("prim") for name in counter.ops)


def test_tensors_searches_nested_containers():
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    nest = {"a": a, "rest": [b, (None, "text", {"c": c})]}
    assert [tensor.numel() for tensor in tensors(nest)] == [1, 2, 3]


def test_relabeled_storages_count_under_the_new_label():
    with MemoryTracker() as tracker:
        tracker.label = "old"
        kept, moved = torch.zeros(7), torch.zeros(11)
        tracker.relabel("new", moved.view(11, 1), torch.zeros(0))
    assert tracker.live_by_label["old"] == kept.nbytes
    assert tracker.live_by_label["new"] == moved.nbytes
    del moved
    assert tracker.live_by_label["new"] == 0
    assert tracker.live == kept.nbytes
