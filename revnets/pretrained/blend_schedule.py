"""A schedule that raises the blend during fine-tuning, starting from the original network."""

from __future__ import annotations

from typing import Any

from torch import nn

from revnets.engine.errors import ArgumentError
from revnets.pretrained.rewired_sequence import rewired_sequences
from revnets.pretrained.update_rules import Blend, checked_blend


class BlendSchedule:
    """Raises the blend of a rewired network linearly from 0 to its target, one step per update (as in Dr2Net).

    At 0 the network equals the original one, and every state is kept, as in the memory mode `recompute`. Gradients are
    exact at every value, so the schedule may stop early.

    Args:
        model: Network made reversible with the rule `blend` and a constant blend.
        updates: Number of updates until the target.
        blend: The target; by default the current blend.

    Attributes:
        update: Number of updates so far.
        updates: Number of updates until the target.
        blend: The target.

    Example:
        >>> schedule = revnets.BlendSchedule(model, updates=500)
        >>> for x, y in batches:
        ...     loss(model(x), y).backward()
        ...     optimizer.step()
        ...     schedule.step()

    Raises:
        ArgumentError: If the model is not rewired, has another rule or a learned blend, or a number is out of range.
    """

    def __init__(self, model: nn.Module, updates: int, blend: float | None = None):
        self._blends = _constant_blends(model)
        if not _is_count(updates, 1):
            text = f"updates = {updates!r}: give the number of updates until the target, at least 1"
            raise ArgumentError(text, "updates", code="out-of-range")
        self.updates = updates
        self.blend = checked_blend(self._blends[0].value if blend is None else blend)
        self._set(0)

    def step(self) -> None:
        """Set the next blend. Call it after each update."""
        self._set(self.update + 1)

    @property
    def value(self) -> float:
        """The current blend."""
        return self.blend * min(self.update, self.updates) / self.updates

    def _set(self, update: int) -> None:
        self.update = update
        for blend in self._blends:
            blend.value = self.value

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule, for a checkpoint."""
        return {"update": self.update, "updates": self.updates, "blend": self.blend}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the schedule, and set its blend.

        Args:
            state: From `state_dict`.

        Raises:
            ArgumentError: If this is not the state of a `BlendSchedule`.
        """
        is_ours = isinstance(state, dict) and set(state) == {"update", "updates", "blend"}
        if not is_ours or not _is_count(state["update"], 0) or not _is_count(state["updates"], 1):
            text = "this is not the state of a BlendSchedule; pass the result of its state_dict()"
            raise ArgumentError(text, "state", code="wrong-format")
        self.updates, self.blend = state["updates"], checked_blend(state["blend"])
        self._set(state["update"])


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _constant_blends(model: nn.Module) -> list[Blend]:
    blends = {id(cell.blend): cell.blend for stack in rewired_sequences(model) for cell in stack.block_cells}
    if not blends:
        text = f"{type(model).__name__} is not rewired; call revnets.make_reversible(model) first"
        raise ArgumentError(text, "model", code="no-columns")
    if any(blend.learned is not None or blend.rule != "blend" for blend in blends.values()):
        text = "a schedule needs the rule `blend` with a constant blend; this blend is learned or has another rule"
        raise ArgumentError(text, "model", code="conflicting-values")
    return list(blends.values())
