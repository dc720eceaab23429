"""Columns of a language model: cells of causal blocks, or a GPT by the midpoint rule.

All states are (B, T, C). A fusion combines states position by position, and only attention accesses earlier positions.
Generation of the next token therefore needs the forward pass of one position and cached keys and values.
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
"""Keyword arguments that every block of a language model gets in addition to its state."""


POSITIONWISE_FUSIONS = (LinearFusion, IdentityFusion)
"""Fusions that act on every position separately; other classes declare this by `is_positionwise = True`."""

SOURCE = "RevColLMConfig"
"""Source that errors of a configuration name."""


class Positionwise(nn.Module):
    """Adapter for a block that acts on every position separately, so it is causal without a mask."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Apply the block; the shape (B, T, C) does not change."""
        return self.block(x)


class FirstState(nn.Module):
    """First cell of a sequence, which copies the embedding."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Copy the embedding (B, T, C)."""
        return x.clone()


class Increment(nn.Module):
    """F_t of the midpoint rule, x_t = F_t(x_(t-1)) + x_(t-2): the output of a block minus its input."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        """Compute the increment; the shape (B, T, C) does not change."""
        return cast(CausalBlock, self.block).increment(x, **context)


def revcol(spec: ColumnsSpec) -> ReversibleColumns:
    """Build columns of RevCol with causal blocks.

    Args:
        spec: Specification of the columns.

    Raises:
        revnets.SpecError: If a component refuses its options or is not causal.
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
    """Build a GPT by the explicit midpoint rule for ordinary differential equations; the first step is an Euler step.

    Args:
        spec: Columns of two levels that define the blocks and the memory modes.
        length: Number of blocks.

    Raises:
        revnets.SpecError: If the blocks refuse their options.
    """
    columns = build_columns(spec, SOURCE)
    blocks = [cast(Level, cell.function).blocks[0] for cell in columns.flat()[:length]]
    later = [Cell(Increment(block), FixedGain()) for block in blocks[1:]]
    cells = [Cell(FirstState(), None), Cell(blocks[0], None), *later]
    sequence = ReversibleColumns(wire(len(cells), 2, [(1,), (1,)]), cells)
    sequence.policy = columns.policy
    return sequence


def _require_positionwise(fusion: nn.Module) -> None:
    """Refuse a fusion that may mix positions, because tokens could depend on later ones."""
    is_known = type(fusion) in POSITIONWISE_FUSIONS or (type(fusion) is ConvNeXtFusion and not fusion.resamples)
    if is_known or getattr(type(fusion), "is_positionwise", False) is True:
        return
    raise SpecError(
        SOURCE,
        "net.fusion",
        f"{type(fusion).__name__} may mix positions, so a token could depend on later ones",
        "Use linear or identity, or set is_positionwise = True in a class that acts on every position separately",
        code="invalid-component",
    )


def _causal(block: nn.Module) -> nn.Module:
    """Return a block that accepts the arguments `CONTEXT`, or refuse one that is not known to be causal."""
    parameters = inspect.signature(block.forward).parameters
    if isinstance(block, MLPBlock):
        return Positionwise(block)
    if all(name in parameters for name in CONTEXT):
        return block
    raise SpecError(
        SOURCE,
        "net.levels",
        f"{type(block).__name__} takes no causal mask, so a token could depend on later ones",
        f"Add the arguments {', '.join(CONTEXT)} to its forward, as in nlp.language_modeling.causal_blocks",
        code="invalid-component",
    )
