"""The result of planning: the bytes of a training step in each memory mode, and the choice under a budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn

from revnets.engine.columns_group import find_columns
from revnets.memory.cell_options import CellPolicy
from revnets.utils.format import size


class PlanError(ValueError):
    """Raised if a plan cannot be made: an argument is invalid, or nothing fits the budget.

    Attributes:
        key: Name of the argument.
        code: Kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, message: str, key: str = "", code: str = "invalid-value"):
        super().__init__(message)
        self.key, self.code = key, code


def _restore(target: Any, state: list[Any]) -> None:
    """Set the fields of a frozen dataclass from a pickle. Older pickles lack the last fields."""
    known = fields(target)
    defaults = [field.default for field in known[len(state) :]]
    for field, value in zip(known, [*state, *defaults], strict=True):
        object.__setattr__(target, field.name, value)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted bytes of one rank in one memory mode, in a training step after the first.

    Attributes:
        mode: Memory mode.
        stored: Indices of the cells that save everything.
        recomputed: Indices of the columns that save their states, as in mode `recompute`.
        kept_cells: Further cells that save their state, as items of `ReversibleColumns.kept`.
        parameters: Bytes of parameters and buffers.
        gradients: Bytes of gradients.
        optimizer: Bytes of the optimizer state.
        buckets: Bytes that DDP or FSDP2 holds for communication.
        kept: Bytes of activations saved for backward.
        peak: Most bytes alive at once, all of the above included.
        flops: Floating point operations of one step, forward and backward.
        extra: Compute of the step relative to `store`: 1.33 means a third more. Waits for the host link are included.
        offloaded: Indices of the cells that move what they save to host memory.
        host: Most bytes in host memory at once.
        products: Matrix products whose results are saved, as items of `ReversibleColumns.products`.
    """

    mode: str
    stored: tuple[int, ...]
    recomputed: tuple[int, ...]
    kept_cells: tuple[tuple[int, int | None], ...]
    parameters: int
    gradients: int
    optimizer: int
    buckets: int
    kept: int
    peak: int
    flops: int
    extra: float
    offloaded: tuple[int, ...] = ()
    host: int = 0
    products: tuple[tuple[int, tuple[int, ...]], ...] = ()

    def __setstate__(self, state: list[Any]) -> None:
        if len(state) == 11:  # an older pickle, without `kept_cells`
            state = [*state[:3], (), *state[3:]]
        _restore(self, state)

    @property
    def name(self) -> str:
        """The policy in words, such as `exact, 2 cells stored`."""
        return self.policy.name

    @property
    def policy(self) -> CellPolicy:
        """What the columns and cells save."""
        ways = self.stored, self.recomputed, self.kept_cells, self.offloaded, self.products
        return CellPolicy(self.mode, *ways)

    def memory(self, columns: int) -> list[str]:
        """Return the memory mode of each column."""
        return self.policy.memory(columns)


@dataclass(frozen=True, slots=True)
class Plan:
    """Predicted memory of a training step in each memory mode, and the choice under a budget.

    Attributes:
        input_shape: Shape of the first input tensor, batch included.
        dtype: Name of the dtype: `float32`, or the autocast dtype.
        ranks: Number of processes that train together.
        sharding: `ddp` or `fsdp`.
        modes: One prediction per requested memory mode.
        budget: Bytes of the budget, or None.
        chosen: Prediction for the policy that was chosen under the budget, or None without a budget.
        host: Bytes of host memory that may be used in addition, or None.
    """

    input_shape: tuple[int, ...]
    dtype: str
    ranks: int
    sharding: str
    modes: tuple[Prediction, ...]
    budget: int | None = None
    chosen: Prediction | None = None
    host: int | None = None

    def __setstate__(self, state: list[Any]) -> None:
        _restore(self, state)

    def apply(self, model: nn.Module) -> None:
        """Set the chosen policy on the reversible columns of a model.

        Raises:
            PlanError: If the plan was made without a budget.
        """
        if self.chosen is None:
            raise PlanError(
                "this plan has no chosen policy because it was made without a budget; pass budget=",
                "budget",
                code="missing-budget",
            )
        self.chosen.policy.apply(find_columns(model))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data for JSON."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """One sentence with the chosen policy, its peak and its cost. Empty without a budget."""
        chosen = self.chosen
        if chosen is None or self.budget is None:
            return ""
        host = f", {size(chosen.host)} in host memory" if chosen.host else ""
        extra = f"{chosen.extra - 1:.0%} more FLOPs than keeping everything" if chosen.extra > 1 else "no more FLOPs"
        return f"Chosen for {size(self.budget)}: {chosen.name}, peak {size(chosen.peak)}{host}, {extra}."
