"""What a plan says: the bytes of a training step in each memory mode, and the choice under a budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from revnets.engine.columns_group import find_columns
from revnets.memory.cell_options import CellPolicy
from revnets.utils.format import size


class PlanError(ValueError):
    """No plan: the request makes no sense, or nothing fits the budget.

    Attributes:
        key: the argument that it is about.
        code: the kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, message: str, key: str = "", code: str = "invalid-value"):
        super().__init__(message)
        self.key, self.code = key, code


def _restore(target: Any, state: list[Any]) -> None:
    """Set the fields of a frozen dataclass from a pickle. An older one ends before the last of them."""
    known = fields(target)
    defaults = [field.default for field in known[len(state) :]]
    for field, value in zip(known, [*state, *defaults], strict=True):
        object.__setattr__(target, field.name, value)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes that one rank needs in one memory mode, once training runs."""

    mode: str
    stored: tuple[int, ...]  # indices of the cells that keep everything
    recomputed: tuple[int, ...]  # columns that keep their states, as in mode `recompute`
    kept_cells: tuple[tuple[int, int | None], ...]  # further cells that keep theirs, as in `ReversibleColumns.kept`
    parameters: int  # buffers included
    gradients: int
    optimizer: int
    buckets: int  # what DDP or FSDP2 holds to communicate
    kept: int  # activations between forward and backward
    peak: int  # most bytes alive at once, all of the above included
    flops: int  # of one step, forward and backward
    extra: float  # work of the step against `store`, 1.33 = a third more; waits for the link to the host included
    offloaded: tuple[int, ...] = ()  # cells that keep in host memory what they keep
    host: int = 0  # bytes there, at most at once
    products: tuple[tuple[int, tuple[int, ...]], ...] = ()  # whose results cells keep, as `ReversibleColumns.products`

    def __setstate__(self, state: list[Any]) -> None:
        if len(state) == 11:  # an older pickle, without `kept_cells`
            state = [*state[:3], (), *state[3:]]
        _restore(self, state)

    @property
    def name(self) -> str:
        return self.policy.name

    @property
    def policy(self) -> CellPolicy:
        """What the cells keep."""
        ways = self.stored, self.recomputed, self.kept_cells, self.offloaded, self.products
        return CellPolicy(self.mode, *ways)

    def memory(self, columns: int) -> list[str]:
        """The memory mode of each column."""
        return self.policy.memory(columns)


@dataclass(frozen=True, slots=True)
class Plan:
    """What each memory mode would take, and the choice under a budget."""

    input_shape: tuple[int, ...]
    dtype: str
    ranks: int
    sharding: str
    modes: tuple[Prediction, ...]
    budget: int | None = None
    chosen: Prediction | None = None  # under the budget
    host: int | None = None  # bytes of host memory that may be used besides

    def __setstate__(self, state: list[Any]) -> None:
        _restore(self, state)

    def apply(self, model: nn.Module) -> None:
        """Set the chosen memory mode on a model."""
        if self.chosen is None:
            raise PlanError(
                "this plan was made without a budget and has chosen nothing; pass budget=",
                "budget",
                code="missing-budget",
            )
        self.chosen.policy.apply(find_columns(model))

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What was chosen under the budget, and what it costs."""
        chosen = self.chosen
        if chosen is None or self.budget is None:
            return ""
        host = f", {size(chosen.host)} in host memory" if chosen.host else ""
        extra = f"{chosen.extra - 1:.0%} more FLOPs than keeping everything" if chosen.extra > 1 else "no more FLOPs"
        return f"Chosen for {size(self.budget)}: {chosen.name}, peak {size(chosen.peak)}{host}, {extra}."
