"""A network of two reversible sequences of different shapes, for tests of several sequences in one model."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from revnets.engine import executor
from revnets.engine.columns import ReversibleSequence

DIMS, DEPTHS = (5, 11), (7, 5)
IMAGES = (3, 3, 29, 23)


def blocks(dim: int, depth: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, dim, 1)) for _ in range(depth)]


class StagedNet(nn.Module):
    """A stem, and two stages with a convolution of stride 2 between them. The list contains the last stage first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIMS[0], 3, padding=1)
        self.late = self.sequence(blocks(DIMS[1], DEPTHS[1]))
        self.early = self.sequence(blocks(DIMS[0], DEPTHS[0]))
        self.downsample = nn.Conv2d(*DIMS, 3, stride=2)
        self.head = nn.Linear(DIMS[1], 2)

    def sequence(self, functions: list[nn.Module]) -> nn.Module:
        return ReversibleSequence(functions)

    def run(self, stage: nn.Module, x: Tensor) -> Tensor:
        return torch.stack(stage(x)).mean(0)

    def forward(self, images: Tensor) -> Tensor:
        x = self.run(self.early, self.stem(images))
        x = self.run(self.late, self.downsample(x))
        return self.head(x.mean((2, 3)))


class RewiredNet(StagedNet):
    """The same network with blocks as submodules instead of sequences. `forward` of the sequences is never called."""

    def sequence(self, functions: list[nn.Module]) -> nn.Module:
        call = SimpleNamespace(sequence=ReversibleSequence(functions))
        for function in functions:
            function._reversible_call = call  # type: ignore[assignment]  # a plain attribute
        return nn.ModuleList(functions)

    def run(self, stage: nn.Module, x: Tensor) -> Tensor:
        sequence = stage[0]._reversible_call.sequence  # type: ignore[index]
        policy = sequence.stored, sequence.verify, sequence.kept, sequence.offloaded, sequence.products
        states, _ = executor.run(sequence.graph, sequence.flat(), x, sequence.memory, {}, (), *policy)
        return torch.stack(states).mean(0)


class Residual(nn.Module):
    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + scale * self.function(x)


class StagedBlocks(nn.Module):
    """Two stages of residual blocks as in pretrained networks, for rewiring. Each block has an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, DIMS[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.ModuleList(map(Residual, blocks(dim, depth))) for dim, depth in zip(DIMS, DEPTHS, strict=True)
        )
        self.downsample = nn.Conv2d(*DIMS, 3, stride=2)
        self.head = nn.Linear(DIMS[1], 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for between, stage in zip((nn.Identity(), self.downsample), self.stages, strict=True):
            x = between(x)
            for position, block in enumerate(stage, start=1):
                x = block(x, torch.tensor(1.0 / position))
        return self.head(x.mean((2, 3)))


def staged_net(kind: type[StagedNet] = StagedNet) -> StagedNet:
    torch.manual_seed(0)
    return kind()


def images() -> Tensor:
    return torch.randn(IMAGES, generator=torch.Generator().manual_seed(1))
