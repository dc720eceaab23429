"""Result of a peak memory breakdown: the parts, their table, and advice on how to lower the peak."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from revnets.utils.format import size, table_of

if TYPE_CHECKING:
    from rich.console import RenderableType

PARTS = {
    "weights": "parameters and buffers",
    "cast weights": "copies of weights in the autocast dtype",
    "gradients": "gradients of the parameters that exist at the peak",
    "optimizer": "optimizer state",
    "input": "the batch",
    "stem": "tensors saved before the columns and between several sequences of columns",
    "window": "the last m states, and gradients of states whose cells have not run backward",
    "kept states": "states that `recompute` saves",
    "lost bits": "what `exact` saves to invert bit for bit",
    "stored cells": "tensors that cells in mode `store` save for backward",
    "running cell": "everything allocated by the cell that runs or is replayed at the peak",
    "head and loss": "everything after the columns: head, logits, loss",
}
"""Parts of the peak in display order, with their meaning."""

STATIC = ("weights", "cast weights", "gradients", "optimizer")


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """The peak of a training step in one memory mode.

    Attributes:
        mode: Memory mode.
        parts: Bytes by part, without parts of 0 bytes.
        place: What runs at the peak: a cell such as `cell c3.l0`, `stem`, or `head and loss`.
        is_backward: Whether the peak is in backward.
        largest_cell: Cell that allocates the most bytes at once when it runs or is replayed.
        largest_cell_bytes: These bytes.
    """

    mode: str
    parts: dict[str, int]
    place: str
    is_backward: bool
    largest_cell: str
    largest_cell_bytes: int

    @property
    def peak(self) -> int:
        """Bytes alive at the peak: the sum of all parts."""
        return sum(self.parts.values())

    def share(self, *parts: str) -> float:
        """Return the fraction of the peak that these parts take."""
        return sum(self.parts.get(part, 0) for part in parts) / self.peak


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Result of `revnets.analysis.peak_memory.memory_parts`.

    Attributes:
        model: Class of the model.
        input_shape: Shape of the first input tensor, batch included.
        dtype: Name of the dtype: `float32`, or the autocast dtype.
        optimizer: Optimizer whose state is counted.
        m: Largest number of levels of a column.
        modes: The peak in each memory mode.
    """

    model: str
    input_shape: tuple[int, ...]
    dtype: str
    optimizer: str
    m: int
    modes: tuple[PeakMemory, ...]

    @property
    def advice(self) -> str:
        """The largest part of the peak of `exact` (or of the lowest peak) in words, and how to lower it."""
        known = {mode.mode: mode for mode in self.modes}
        best = known.get("exact") or min(self.modes, key=lambda mode: mode.peak)
        saving = f"{best.mode} takes {size(best.peak)}"
        if "store" in known and best.mode != "store":
            saving += f", store {size(known['store'].peak)}"
        largest = max((part for part in PARTS if part not in STATIC), key=lambda part: best.parts.get(part, 0))
        batch = self.input_shape[0] if self.input_shape else 1
        sample = size((best.peak - sum(best.parts.get(part, 0) for part in STATIC)) / batch)
        reasons = {
            "head and loss": "is for head, logits and loss: it does not depend on the number of columns or the memory "
            "mode; compute the loss in chunks to lower it",
            "running cell": f"is for {best.place} alone: it does not depend on the number of columns; use fewer blocks "
            "per cell, or checkpointing inside the cell, to lower it",
            "window": f"is the window of {self.m} states: it grows with the batch and the size of the input, not with "
            "the number of columns",
            "stem": "is saved outside the cells, so no memory mode changes it; checkpoint that part to lower it",
            "input": "is the input itself",
            "lost bits": "is lost bits; gains closer to 1 lose fewer",
            "kept states": "is kept states; mode exact saves only their lost bits",
            "stored cells": "is saved by stored cells; modes recompute and exact recompute them",
        }
        share, static = best.share(largest), best.share(*STATIC)
        if static <= share:
            return f"{saving}; {share:.0%} of it {reasons[largest]}."
        return (
            f"{saving}; {static:.0%} of it is weights, gradients and optimizer state, which no memory mode changes. "
            f"One more sample takes {sample}, most of it for {largest}: increase the batch, shard the weights, or use "
            "an optimizer with less state."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        modes = [{**asdict(mode), "peak": mode.peak} for mode in self.modes]
        return {**asdict(self), "modes": modes, "advice": self.advice}

    def table(self) -> RenderableType:
        """Return a table of the parts by mode, and the advice, for `rich.print`."""
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
    """Break a place into lines for a narrow column."""
    return place.replace(" of ", "\nof ")
