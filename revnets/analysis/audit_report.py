"""Result of an audit: the measured numbers, their verdicts, and their tables.

Verdicts on the gradients of a memory mode:

- `exact` (green): every gradient equals that of `store`, which is ordinary autograd, bit for bit.
- `drift` (yellow): gradients differ within the limit.
- `wrong` (red): gradients differ by more than the limit, are not finite, or the pass failed.

The limit is 0 for `recompute` and `exact`, which promise equal bits, and 1 % of the gradient for `invert`. If two runs
of `store` differ (kernels with atomic additions), the limit is at least ten times their difference.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from revnets.engine.drift import INVERT_LIMIT
from revnets.utils.format import duration, size, table_of, thinned

if TYPE_CHECKING:
    from rich.console import RenderableType


COLORS = {"exact": "green", "drift": "yellow", "wrong": "red"}
"""Colors of the verdicts in a terminal."""

MOST_LEVELS = 8
"""Largest number of levels whose errors the table shows one by one."""

_PHRASES = {"exact": "bit for bit", "drift": "drifts", "wrong": "WRONG"}


@dataclass(frozen=True, slots=True)
class ColumnAudit:
    """Reconstruction of the states of one column from those of the last column.

    Attributes:
        column: Index of the column.
        elements: Elements of the state of each level.
        invert_error: |rebuilt - state| / |state| by the plain inverse, L2 norm over all levels.
        invert_max: Largest difference divided by the largest element.
        invert_levels: L2 error of each level.
        exact: Whether mode `exact` rebuilds every bit.
    """

    column: int
    elements: tuple[int, ...]
    invert_error: float
    invert_max: float
    invert_levels: tuple[float, ...]
    exact: bool


@dataclass(frozen=True, slots=True)
class ModeAudit:
    """Measurements of one forward and backward pass in one memory mode.

    Attributes:
        mode: Memory mode.
        gradient_error: |gradient - reference| / |reference|, L2 norm over all parameters. The reference is `store`.
        worst_parameter: Parameter with the largest relative error, or empty if all are equal.
        worst_error: Relative error of that parameter.
        equal: Whether all gradients are equal bit for bit.
        kept_bytes: Bytes that the forward pass leaves alive for backward, outputs included.
        peak_bytes: Most bytes alive at once, including gradients, without parameters and inputs.
        column_bytes: Bytes that the forward pass of each column adds.
        forward_matmuls: Calls of matrix products, convolutions and attention kernels in forward.
        backward_matmuls: The same in backward.
        forward_flops: Floating point operations of forward.
        backward_flops: Floating point operations of backward.
        failure: Error message if the pass failed.
        first_columns: Positions in `column_bytes` of the first column of each sequence.
        seconds: Seconds of one step: CPU time, or elapsed time on an accelerator.
    """

    mode: str
    gradient_error: float
    worst_parameter: str
    worst_error: float
    equal: bool
    kept_bytes: int
    peak_bytes: int
    column_bytes: tuple[int, ...]
    forward_matmuls: int
    backward_matmuls: int
    forward_flops: int
    backward_flops: int
    failure: str = ""
    first_columns: tuple[int, ...] = (0,)
    seconds: float = field(default=math.nan, compare=False)

    @property
    def bytes_per_column(self) -> float:
        """Mean number of bytes that one more column adds.

        First columns of a sequence do not count, because they add the window of states.
        """
        added = [count for place, count in enumerate(self.column_bytes) if place not in self.first_columns]
        return sum(added) / len(added) if added else math.nan


@dataclass(frozen=True, slots=True)
class Audit:
    """Result of `revnets.audit`.

    Attributes:
        model: Class of the model.
        m: Largest number of levels of a column.
        columns: Reconstruction of each column except those from which backward starts.
        modes: Measurements of each memory mode.
        noise: Gradient error between two runs of `store`. 0 if its kernels are deterministic.
    """

    model: str
    m: int
    columns: tuple[ColumnAudit, ...]
    modes: tuple[ModeAudit, ...]
    noise: float

    def limit(self, mode: str) -> float:
        """Return the gradient error above which a mode is wrong."""
        return max(INVERT_LIMIT if mode == "invert" else 0.0, 10 * self.noise)

    def verdict(self, mode: ModeAudit) -> str:
        """Return `exact`, `drift` or `wrong`: equal gradients, errors within `limit`, or neither."""
        if mode.failure or not mode.gradient_error <= self.limit(mode.mode):  # NaN is wrong as well
            return "wrong"
        return "exact" if mode.equal else "drift"

    @property
    def ok(self) -> bool:
        """Whether no gradient is wrong and mode `exact` rebuilds every state bit for bit."""
        return all(self.verdict(mode) != "wrong" for mode in self.modes) and all(c.exact for c in self.columns)

    @property
    def nothing_rebuilt(self) -> str:
        """The reason why `columns` is empty."""
        failed = any(mode.failure for mode in self.modes)
        return "the states could not be rebuilt" if failed else "nothing is rebuilt: there is only one column"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON. NaN and infinity become text, because JSON has neither."""
        modes = [
            {**asdict(mode), "bytes_per_column": mode.bytes_per_column, "verdict": self.verdict(mode)}
            for mode in self.modes
        ]
        return _plain({"ok": self.ok, **asdict(self), "modes": modes})

    def table(self) -> RenderableType:
        """Return two colored tables for `rich.print`: gradients and memory by mode, and states by column."""
        from rich.console import Group

        return Group(self._modes_table(), "", self._columns_table() if self.columns else self.nothing_rebuilt)

    def _modes_table(self) -> RenderableType:
        from rich.text import Text

        headings = (
            "mode",
            "gradient",
            "error",
            "kept",
            "per\ncolumn",
            "peak",
            "matmuls\nfwd+bwd",
            "step",
        )
        table = table_of("One training step in each memory mode", headings, left=2)
        notes = []
        for mode in self.modes:
            verdict = self.verdict(mode)
            phrase = "reference" if mode.mode == "store" else "FAILED" if mode.failure else _PHRASES[verdict]
            table.add_row(
                *(Text(cell, COLORS[verdict]) for cell in (mode.mode, phrase, _number(mode.gradient_error))),
                size(mode.kept_bytes),
                size(mode.bytes_per_column),
                size(mode.peak_bytes),
                f"{mode.forward_matmuls}+{mode.backward_matmuls}",
                duration(mode.seconds),
            )
            if mode.failure:
                notes.append(f"{mode.mode}: {mode.failure}")
            elif not mode.equal:
                notes.append(f"{mode.mode}: largest error {_number(mode.worst_error)} in {mode.worst_parameter}")
        if self.noise:
            notes.append(f"two runs of store differ by {_number(self.noise)}: its kernels are not deterministic")
        table.caption = "\n".join(notes)
        return table

    def _columns_table(self) -> RenderableType:
        from rich.text import Text

        shown = self.m if self.m <= MOST_LEVELS else 0
        levels = [f"level\n{level}" for level in range(shown)]
        headings = ("column", "exact", "invert:\nerror", "largest", *levels)
        table = table_of("States rebuilt from those of the last column", headings, left=2)
        for column in thinned(self.columns, 16):
            if column is None:
                table.add_row("...")
                continue
            errors = (column.invert_error, column.invert_max, *column.invert_levels[:shown])
            table.add_row(
                str(column.column),
                Text("bit for bit", COLORS["exact"]) if column.exact else Text("DIFFERS", COLORS["wrong"]),
                *(Text(f"{error:.0e}" if error else "0", COLORS[_grade(error)]) for error in errors),
            )
        return table


def _grade(error: float) -> str:
    return "exact" if error == 0 else "drift" if error <= INVERT_LIMIT else "wrong"


def _number(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
