"""A blend that grows over the first updates of a fine-tuning, from the network as it was trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from revnets.engine.errors import ArgumentError
from revnets.pretrained.rewired_sequence import rewired_sequences
from revnets.pretrained.update_rules import Blend, checked_blend


class BlendSchedule:
    """Raises the blend of a rewired network from 0 to its target in equal steps, one per update (after Dr2Net).

    At 0 the network computes what it was trained for, and every state is kept, as in the memory mode `recompute`.
    Lost bits make every value on the way exact, so the schedule may be stopped anywhere.

    Args:
        model: made reversible with the rule `blend` and a constant blend.
        updates: number of updates until the target.
        blend: the target; by default the present blend.

    Example:
        >>> schedule = BlendSchedule(model, updates=500)
        >>> for x, y in batches:
        ...     loss(model(x), y).backward()
        ...     optimizer.step()
        ...     schedule.step()

    Raises:
        ArgumentError: the model is not rewired so, or a number is out of range.
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
        """Go to the next value, after an update."""
        self._set(self.update + 1)

    @property
    def value(self) -> float:
        """The present blend."""
        return self.blend * min(self.update, self.updates) / self.updates

    def _set(self, update: int) -> None:
        self.update = update
        for blend in self._blends:
            blend.value = self.value

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"update": self.update, "updates": self.updates, "blend": self.blend}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            ArgumentError: it is the state of something else.
        """
        is_ours = isinstance(state, dict) and set(state) == {"update", "updates", "blend"}
        if not is_ours or not _is_count(state["update"], 0) or not _is_count(state["updates"], 1):
            raise ArgumentError("this is no state of a BlendSchedule", "state", code="wrong-format")
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
        text = "a schedule is for the rule `blend` with a constant blend; this one is learned, or of another rule"
        raise ArgumentError(text, "model", code="conflicting-values")
    return list(blends.values())
