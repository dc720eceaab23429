"""What the peak of a training step consists of: the parts, how they are shown, and the advice that follows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from revnets.utils.format import size, table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

PARTS = {
    "weights": "parameters and buffers",
    "cast weights": "copies of weights in the dtype of autocast",
    "gradients": "of the parameters, as far as they are there",
    "optimizer": "its state",
    "input": "the batch",
    "stem": "what is saved before the columns and between several sequences of them",
    "window": "the last m states, and gradients that wait for their cells",
    "kept states": "states that `recompute` keeps",
    "lost bits": "what `exact` keeps to invert bit for bit",
    "stored cells": "what cells in `store` save for backward",
    "running cell": "all that the one cell needs that runs, or is replayed, at the peak",
    "head and loss": "what is behind the columns: head, logits, loss",
}
"""Parts of the peak, in the order in which they are shown."""

STATIC = ("weights", "cast weights", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The peak of a step in one memory mode."""

    mode: str
    parts: dict[str, int]  # bytes by part, without those that are 0
    place: str  # what runs at the peak: a cell, such as `cell c3.l0`, `stem` or `head and loss`
    is_backward: bool
    largest_cell: str  # the one that makes most bytes at once, when it runs or is replayed
    largest_cell_bytes: int

    @property
    def peak(self) -> int:
        """Bytes alive at the peak, all parts together."""
        return sum(self.parts.values())

    def share(self, *parts: str) -> float:
        """The share of these parts in the peak."""
        return sum(self.parts.get(part, 0) for part in parts) / self.peak


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """What `memory_parts` found; `table()` is for people, `to_dict()` for machines."""

    model: str
    input_shape: tuple[int, ...]
    dtype: str
    optimizer: str
    m: int
    modes: tuple[PeakMemory, ...]

    @property
    def advice(self) -> str:
        """One sentence on the largest part of the peak of `exact`, or of the lowest one, and on what lowers it."""
        known = {mode.mode: mode for mode in self.modes}
        best = known.get("exact") or min(self.modes, key=lambda mode: mode.peak)
        saving = f"{best.mode} takes {size(best.peak)}"
        if "store" in known and best.mode != "store":
            saving += f" where store takes {size(known['store'].peak)}"
        largest = max((part for part in PARTS if part not in STATIC), key=lambda part: best.parts.get(part, 0))
        batch = self.input_shape[0] if self.input_shape else 1
        sample = size((best.peak - sum(best.parts.get(part, 0) for part in STATIC)) / batch)
        reasons = {
            "head and loss": "is behind the columns (head, logits, loss): more columns do not change it and no memory "
            "mode lowers it, a loss that is computed in chunks does",
            "running cell": f"is what {best.place} needs alone: more columns do not raise it, and a cell of fewer "
            "blocks, or checkpointing inside of the cell, lowers it",
            "window": f"is the window of {self.m} states: it grows with the batch and the size of the input, not with "
            "the number of columns",
            "stem": "is saved outside of the cells, where no memory mode changes it: checkpoint that part",
            "input": "is the input itself",
            "lost bits": "is lost bits: gains nearer to 1 lose fewer",
            "kept states": "is kept states: mode exact keeps their lost bits alone",
            "stored cells": "is saved by stored cells: modes recompute and exact replay them",
        }
        share, static = best.share(largest), best.share(*STATIC)
        if static <= share:
            return f"{saving}; {share:.0%} of it {reasons[largest]}."
        return (
            f"{saving}; {static:.0%} of it is weights, gradients and optimizer, which no memory mode changes: a sample "
            f"more takes {sample}, most of it for {largest}, so increase the batch, shard the weights or take an "
            "optimizer with less state."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        modes = [{**asdict(mode), "peak": mode.peak} for mode in self.modes]
        return {**asdict(self), "modes": modes, "advice": self.advice}

    def table(self) -> RenderableType:
        """Parts by mode, and the advice, for `rich.print`."""
        from rich.console import Group
        from rich.text import Text

        shape = " x ".join(map(str, self.input_shape))
        title = f"Bytes at the peak of a training step, input {shape}, {self.dtype}, {self.optimizer}"
        table = table_of(title, ("", *(mode.mode for mode in self.modes)), left=1)
        for part in PARTS:
            counts = [mode.parts.get(part, 0) for mode in self.modes]
            if any(counts):
                table.add_row(part, *(size(count) if count else "" for count in counts))
        table.add_section()
        table.add_row("peak", *(size(mode.peak) for mode in self.modes), style="bold")
        cells = [f"{size(mode.largest_cell_bytes)}\n{_broken(mode.largest_cell)}" for mode in self.modes]
        table.add_row("largest cell", *cells)
        places = [
            ("backward of\n" if mode.is_backward else "forward of\n") + _broken(mode.place) for mode in self.modes
        ]
        table.add_row("reached in", *places)
        return Group(table, "", Text(self.advice))


def _broken(place: str) -> str:
    """A place in lines that a narrow column has room for."""
    return place.replace(" of ", "\nof ")
