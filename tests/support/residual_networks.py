"""Small residual networks with weights that look trained, for tests of rewiring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import revnets

DIM, TOKENS, BATCH, CLASSES, DEPTH = 13, 7, 3, 5, 6


class ResidualBlock(nn.Module):
    """G(x) = x + f(x), with dropout and an optional shift that the caller passes."""

    def __init__(self, dim: int = DIM, hidden: int = 17, dropout: float = 0.1):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.drop = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        y = self.down(self.drop(nn.functional.gelu(self.up(self.norm(x)))))
        return x + y if shift is None else x + y + shift


class TupleBlock(ResidualBlock):
    """Returns the mean of its hidden layer in addition to the state, as attention layers return their weights."""

    def forward(self, x: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x, shift)
        return y, y.mean(-1)


class ResidualNetwork(nn.Module):
    """A stem, blocks in a loop as in transformers, and a classifier."""

    def __init__(self, depth: int = DEPTH, block: type[nn.Module] = ResidualBlock, **options: Any):
        super().__init__()
        self.stem = nn.Linear(11, DIM)
        self.layers = nn.ModuleList(block(**options) for _ in range(depth))
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, x: Tensor, shifts: Tensor | None = None) -> Tensor:
        x = self.stem(x)
        for index, layer in enumerate(self.layers):
            out = layer(x, shift=None if shifts is None else shifts[index])
            x = out[0] if isinstance(out, tuple) else out
        return self.head(x.mean(1))


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(BATCH, TOKENS, 11, generator=torch.Generator().manual_seed(seed))


def training_step(model: nn.Module, *args: Any, memory: str) -> list[Tensor | None]:
    """Return the output and the gradients of all parameters, in that order."""
    revnets.find_columns(model).memory = memory
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    output = model(*args)
    output.square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


def assert_exact_is_store(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Assert that the gradients of all parameters in `exact` equal those in `store` bit for bit."""
    grads = []
    for memory in ("store", "exact"):
        revnets.find_columns(model).memory = memory
        model.zero_grad(set_to_none=True)
        torch.manual_seed(1)
        loss().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert_same_tensors(*grads)


def assert_same_tensors(one: list[Tensor | None], other: list[Tensor | None]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert (left is None) == (right is None)
        assert left is None or right is None or torch.equal(left, right)
