"""Backward inside vmap: one replay for the whole batch, outside all transforms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from revnets import ReversibleSequence


def run(memory: str) -> tuple[Tensor, Tensor, nn.Module, list[int]]:
    """Return input, output, model and a list with one item per call of a cell."""
    calls: list[int] = []
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.3), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(4)]
    net = ReversibleSequence(blocks, m=2, memory=memory)
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 4, requires_grad=True)
    return x, net(x)[-1], net, calls


def batched(x: Tensor, y: Tensor) -> Tensor:
    vectors = torch.eye(12).view(12, 3, 4)
    return torch.autograd.grad(y, x, vectors, is_grads_batched=True, retain_graph=True)[0]


def by_vmap(x: Tensor, y: Tensor) -> Tensor:
    def gradient(vector: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, vector, retain_graph=True)[0]

    return torch.func.vmap(gradient)(torch.eye(12).view(12, 3, 4))


def by_nested_vmap(x: Tensor, y: Tensor) -> Tensor:
    def gradient(vector: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, vector, retain_graph=True)[0]

    return torch.func.vmap(torch.func.vmap(gradient))(torch.eye(12).view(3, 4, 3, 4)).view(12, 3, 4)


def by_jacrev(x: Tensor, y: Tensor) -> Tensor:
    """Backward is linear in its vector; its Jacobian is the transposed Jacobian of the model."""

    def gradient(vector: Tensor) -> Tensor:
        return torch.autograd.grad(y, x, vector, create_graph=True)[0]

    return torch.func.jacrev(gradient)(torch.zeros(3, 4)).flatten(0, 1).flatten(1).T.reshape(12, 3, 4)


@pytest.mark.parametrize("method", [batched, by_vmap, by_nested_vmap, by_jacrev])
@pytest.mark.parametrize("memory", ["recompute", "exact", "invert"])
def test_jacobian_through_dropout(method, memory):
    x, y, *_ = run("store")
    expected = torch.stack(
        [torch.autograd.grad(y, x, vector, retain_graph=True)[0] for vector in torch.eye(12).view(12, 3, 4)]
    )
    x, y, net, calls = run(memory)
    statistics = [buffer.clone() for buffer in net.buffers()]
    del calls[:]
    torch.testing.assert_close(method(x, y), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 4
    assert all(torch.equal(buffer, before) for buffer, before in zip(net.buffers(), statistics, strict=True))


def test_transforms_are_active_again_after_the_replay():
    x, y, *_ = run("exact")

    def gradient(vector: Tensor) -> Tensor:
        result = torch.autograd.grad(y, x, vector, retain_graph=True)[0]
        with pytest.raises(RuntimeError, match="random"):
            torch.rand_like(vector)
        return result

    torch.func.vmap(gradient)(torch.eye(12).view(12, 3, 4))
    assert not torch._C._are_functorch_transforms_active()
