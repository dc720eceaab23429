"""A RevNet (m = 2, gamma = 1), and the methods to train it that `reversible_libraries.py` compares.

x_t = F_t(x_{t-1}) + x_{t-2}, where both streams start as the stem's output. All methods share stem, blocks, head and
batch.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import revnets
from revnets.config.memory_budget import BudgetSpec

Streams = Sequence[Tensor]
Trunk = Callable[[Tensor], Streams]
"""Maps the stem's output to the last two states (x_{T-2}, x_{T-1})."""


# ------------------------------------------------------------------------------------------------------- networks


class Convolutions(nn.Sequential):
    """The residual function of a pre-activation RevNet (Gomez et al., 2017) on images (B, H, W, C)."""

    def __init__(self, dim: int):
        norms = [nn.GroupNorm(8, dim) for _ in range(2)]
        convs = [nn.Conv2d(dim, dim, 3, padding=1, bias=False) for _ in range(2)]
        super().__init__(norms[0], nn.ReLU(), convs[0], norms[1], nn.ReLU(), convs[1])

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Mlp(nn.Sequential):
    """LayerNorm and a two-layer perceptron on tokens (B, N, C)."""

    def __init__(self, dim: int):
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


class Case(NamedTuple):
    """A kind of block and the shape of its states, with channels last."""

    block: Callable[[int], nn.Module]
    shape: tuple[int, ...]
    words: str


CASES = {
    "mlp": Case(Mlp, (16, 196, 192), "LayerNorm-Linear-GELU-Linear"),
    "conv": Case(Convolutions, (8, 32, 32, 64), "2 x (GroupNorm-ReLU-Conv 3x3)"),
}


class Net(nn.Module):
    """Stem, blocks and head. The trunk determines how the blocks run."""

    def __init__(self, block: Callable[[int], nn.Module], depth: int, dim: int, patch: int = 48, classes: int = 100):
        super().__init__()
        self.stem = nn.Linear(patch, dim)
        self.blocks = nn.ModuleList(block(dim) for _ in range(depth))
        self.head = nn.Linear(dim, classes)

    def logits(self, trunk: Trunk, patches: Tensor) -> Tensor:
        one, other = trunk(self.stem(patches))
        return self.head((one + other).flatten(1, -2).mean(1))


class Trained(nn.Module):
    """A network whose blocks are run by one method."""

    def __init__(self, net: Net, way: Way):
        super().__init__()
        self.net, self.trunk = net, way.make(net.blocks)
        if way.budget is not None:
            revnets.keep_budget(self, BudgetSpec(budget=way.budget, optimizer="none"))

    def forward(self, patches: Tensor) -> Tensor:
        return self.net.logits(self.trunk, patches)


# -------------------------------------------------------------------------------------------------------- methods


def plain(blocks: nn.ModuleList) -> Trunk:
    """Use ordinary autograd."""

    def trunk(x: Tensor) -> Streams:
        before, now = x, x
        for block in blocks:
            before, now = now, block(now) + before
        return before, now

    return trunk


def checkpointed(blocks: nn.ModuleList) -> Trunk:
    """Use `torch.utils.checkpoint` around every block."""

    def trunk(x: Tensor) -> Streams:
        before, now = x, x
        for block in blocks:
            before, now = now, checkpoint(block, now, use_reentrant=False) + before
        return before, now

    return trunk


def ours(memory: str) -> Callable[[nn.ModuleList], Trunk]:
    def make(blocks: nn.ModuleList) -> Trunk:
        # Two identities: both streams start as the stem's output.
        return revnets.ReversibleSequence([nn.Identity(), nn.Identity(), *blocks], m=2, memory=memory)

    return make


# The other libraries take both streams in one tensor and split it. Stacking along the batch axis is cheapest: the split
# is then a view, where a split of channels would copy.


def memcnn(blocks: nn.ModuleList) -> Trunk:
    """Use an `InvertibleModuleWrapper` around each pair of blocks, as in its documentation."""
    library = _import("memcnn")
    pairs = nn.Sequential(
        *(
            library.InvertibleModuleWrapper(library.AdditiveCoupling(Fm=f, Gm=g, split_dim=0))
            for f, g in zip(blocks[::2], blocks[1::2], strict=True)
        )
    )
    return lambda x: tuple(pairs(torch.cat((x, x))).chunk(2))


def revlib(mode: str) -> Callable[[nn.ModuleList], Trunk]:
    def make(blocks: nn.ModuleList) -> Trunk:
        library = _import("revlib")
        net = library.ReversibleSequential(*blocks, split_dim=0, memory_mode=library.MemoryModes[mode])
        return lambda x: tuple(net(torch.cat((x, x))).chunk(2))

    return make


def _import(package: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # memcnn uses interfaces that torch.amp has replaced
        return importlib.import_module(package)


class Way(NamedTuple):
    """One method to train the same blocks."""

    make: Callable[[nn.ModuleList], Trunk]
    package: str | None = None  # package on PyPI that it needs
    budget: str | None = None  # memory mode whose peak is the budget of the plan


WAYS = {
    "plain autograd": Way(plain),
    "torch checkpoint": Way(checkpointed),
    "memcnn": Way(memcnn, "memcnn"),
    "revlib": Way(revlib("autograd_function"), "revlib"),  # its default, and the fastest
    "revlib graph": Way(revlib("autograd_graph"), "revlib"),
    **{f"revnets {memory}": Way(ours(memory)) for memory in ("store", "recompute", "invert", "exact")},
    "revnets exact, planned": Way(ours("exact"), budget="exact"),
}
REFERENCE = "plain autograd"
"""Method whose gradients are the reference."""


def installed() -> tuple[list[str], list[str]]:
    """Return the names of the methods that can run here, and the packages that the others need."""
    missing = {way.package for way in WAYS.values() if way.package and importlib.util.find_spec(way.package) is None}
    return [name for name, way in WAYS.items() if way.package not in missing], sorted(missing)
