"""From a configuration to the columns of a language model: cells of causal blocks, or a GPT by the midpoint rule.

All states are (B, T, C) of one length and width. A cell reads other states at a position only and looks at earlier
positions through attention alone, so that the next token takes the plain forward of one position and the keys and
values of those before it.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

from torch import Tensor, nn

from revnets import Cell, FixedGain, ReversibleColumns, SpecError, build_columns, wire
from revnets.config.net_spec import ColumnsSpec
from revnets.models.net import Level
from revnets.nn.blocks import MLPBlock
from revnets.nn.fusions import ConvNeXtFusion, IdentityFusion, LinearFusion

from .causal_blocks import CausalBlock

CONTEXT = ("rotation", "mask", "cache")
"""Arguments with which every block of a language model is called besides its state."""


POSITIONWISE_FUSIONS = (LinearFusion, IdentityFusion)
"""Fusions that read other states at one position at a time; others declare it by `is_positionwise = True`."""

SOURCE = "RevColLMConfig"
"""The name under which mistakes of a configuration are reported."""


class Positionwise(nn.Module):
    """A block that looks at one position at a time, and so at none that comes later."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return self.block(x)


class FirstState(nn.Module):
    """The first state of a sequence: the embedding itself."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x.clone()


class Increment(nn.Module):
    """F_t of the midpoint rule, x_t = F_t(x_(t-1)) + x_(t-2): what a block adds to its input."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        return cast(CausalBlock, self.block).increment(x, **context)


def revcol(spec: ColumnsSpec) -> ReversibleColumns:
    """Columns of RevCol with causal blocks.

    Raises:
        revnets.SpecError: a part refuses its options, or may see later positions.
    """
    columns = build_columns(spec, SOURCE)
    for cell in columns.flat():
        level = cast(Level, cell.function)
        _require_positionwise(level.fusion)
        blocks = level.blocks
        for index, block in enumerate(blocks):
            blocks[index] = _causal(block)
    return columns


def midpoint(spec: ColumnsSpec, length: int) -> ReversibleColumns:
    """A GPT by the explicit midpoint rule of an ordinary differential equation; the first step is one of Euler's.

    Args:
        spec: columns of two levels, which give the blocks and the memory modes.
        length: number of blocks.

    Raises:
        revnets.SpecError: the blocks refuse their options.
    """
    columns = build_columns(spec, SOURCE)
    blocks = [cast(Level, cell.function).blocks[0] for cell in columns.flat()[:length]]
    later = [Cell(Increment(block), FixedGain()) for block in blocks[1:]]
    cells = [Cell(FirstState(), None), Cell(blocks[0], None), *later]
    sequence = ReversibleColumns(wire(len(cells), 2, [(1,), (1,)]), cells)
    sequence.policy = columns.policy
    return sequence


def _require_positionwise(fusion: nn.Module) -> None:
    """Refuse a fusion that may mix positions, by which a token would see later ones."""
    is_known = type(fusion) in POSITIONWISE_FUSIONS or (type(fusion) is ConvNeXtFusion and not fusion.resamples)
    if is_known or getattr(type(fusion), "is_positionwise", False) is True:
        return
    raise SpecError(
        SOURCE,
        "net.fusion",
        f"{type(fusion).__name__} may mix positions, so that a token would see those that it has to predict",
        "Choose linear or identity, or declare is_positionwise = True in a class that reads one position at a time",
        code="invalid-component",
    )


def _causal(block: nn.Module) -> nn.Module:
    """A block that can be called with `CONTEXT`; refuses one that does not say that it can."""
    parameters = inspect.signature(block.forward).parameters
    if isinstance(block, MLPBlock):
        return Positionwise(block)
    if all(name in parameters for name in CONTEXT):
        return block
    raise SpecError(
        SOURCE,
        "net.levels",
        f"{type(block).__name__} takes no causal mask, so that a token would see those that it has to predict",
        f"Give its forward the arguments {', '.join(CONTEXT)}, as nlp.language_modeling.causal_blocks has them",
        code="invalid-component",
    )
