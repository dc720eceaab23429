"""What an audit found: the numbers, the verdict on them, and how they are shown.

- `exact` (green): every gradient is bit for bit that of `store`, which is ordinary autograd.
- `drift` (yellow): it differs, within the limit.
- `wrong` (red): it differs by more, is not finite, or the pass failed.

The limit is 0 for `recompute` and `exact`, which promise equal bits, and 1 % of the gradient for `invert`. Where
`store` does not repeat itself bit for bit (kernels with atomic additions), ten times its own difference is granted.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from revnets.engine.drift import INVERT_LIMIT
from revnets.utils.format import duration, size, table_of, thinned

if TYPE_CHECKING:
    from rich.console import RenderableType


COLOURS = {"exact": "green", "drift": "yellow", "wrong": "red"}
"""Of the verdicts, in a terminal."""

MOST_LEVELS = 8
"""Of columns with more levels, the table does not give the errors one by one."""

_PHRASES = {"exact": "bit for bit", "drift": "drifts", "wrong": "WRONG"}


@dataclass(frozen=True, slots=True)
class ColumnAudit:
    """How one column's states come back when backward rebuilds them from the last column's."""

    column: int
    elements: tuple[int, ...]  # of each level's state
    invert_error: float  # |rebuilt - state| / |state|, L2 over all levels, by the plain inverse
    invert_max: float  # the largest difference over the largest element
    invert_levels: tuple[float, ...]  # the L2 error of each level
    exact: bool  # does `exact` give back every bit?


@dataclass(frozen=True, slots=True)
class ModeAudit:
    """One forward and backward in one memory mode."""

    mode: str
    gradient_error: float  # |gradient - store's| / |store's|, L2 over all parameters
    worst_parameter: str  # the one with the largest error of its own; empty if all are equal
    worst_error: float  # that error
    equal: bool  # bit for bit, every parameter
    kept_bytes: int  # alive between forward and backward because of the forward, outputs included
    peak_bytes: int  # most alive at once, gradients included, parameters and inputs not
    column_bytes: tuple[int, ...]  # by how much each column's forward raised what is alive
    forward_matmuls: int  # calls of matrix products, convolutions and attention kernels
    backward_matmuls: int
    forward_flops: int
    backward_flops: int
    failure: str = ""  # the error, if the pass ended in one
    first_columns: tuple[int, ...] = (0,)  # places in column_bytes of the columns with which a sequence starts
    seconds: float = field(default=math.nan, compare=False)  # of one step: CPU time, on an accelerator elapsed time

    @property
    def bytes_per_column(self) -> float:
        """By how much one more column raises what is kept.

        The first one of a sequence does not count: it brings the window of states.
        """
        added = [count for place, count in enumerate(self.column_bytes) if place not in self.first_columns]
        return sum(added) / len(added) if added else math.nan


@dataclass(frozen=True, slots=True)
class Audit:
    """What `revnets.audit` found; `table()` is for people, `to_dict()` for machines, `ok` for scripts."""

    model: str
    m: int
    columns: tuple[ColumnAudit, ...]
    modes: tuple[ModeAudit, ...]
    noise: float  # gradient error of `store` against itself: 0 if its kernels are deterministic

    def limit(self, mode: str) -> float:
        """The gradient error above which a mode is wrong."""
        return max(INVERT_LIMIT if mode == "invert" else 0.0, 10 * self.noise)

    def verdict(self, mode: ModeAudit) -> str:
        """`exact`, `drift` or `wrong`, as the head of this module defines them."""
        if mode.failure or not mode.gradient_error <= self.limit(mode.mode):  # NaN is wrong as well
            return "wrong"
        return "exact" if mode.equal else "drift"

    @property
    def ok(self) -> bool:
        """No gradient is wrong, and `exact` rebuilds every state bit for bit."""
        return all(self.verdict(mode) != "wrong" for mode in self.modes) and all(c.exact for c in self.columns)

    @property
    def nothing_rebuilt(self) -> str:
        """Why there is nothing to say about the columns, where there is not."""
        failed = any(mode.failure for mode in self.modes)
        return "the states could not be rebuilt" if failed else "nothing is rebuilt: there is one column only"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON, which has no NaN and no infinity: those become text."""
        modes = [
            {**asdict(mode), "bytes_per_column": mode.bytes_per_column, "verdict": self.verdict(mode)}
            for mode in self.modes
        ]
        return _plain({"ok": self.ok, **asdict(self), "modes": modes})

    def table(self) -> RenderableType:
        """Two tables in colours, for `rich.print`: gradients and memory by mode, states by column."""
        from rich.console import Group

        return Group(self._modes_table(), "", self._columns_table() if self.columns else self.nothing_rebuilt)

    def _modes_table(self) -> RenderableType:
        from rich.text import Text

        headings = (
            "mode",
            "gradient",
            "error",
            "kept",
            "more by\na column",
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
                *(Text(cell, COLOURS[verdict]) for cell in (mode.mode, phrase, _number(mode.gradient_error))),
                size(mode.kept_bytes),
                size(mode.bytes_per_column),
                size(mode.peak_bytes),
                f"{mode.forward_matmuls}+{mode.backward_matmuls}",
                duration(mode.seconds),
            )
            if mode.failure:
                notes.append(f"{mode.mode}: {mode.failure}")
            elif not mode.equal:
                notes.append(f"{mode.mode}: farthest off is {mode.worst_parameter}, by {_number(mode.worst_error)}")
        if self.noise:
            notes.append(f"store differs from itself by {_number(self.noise)}: its kernels are not deterministic")
        table.caption = "\n".join(notes)
        return table

    def _columns_table(self) -> RenderableType:
        from rich.text import Text

        shown = self.m if self.m <= MOST_LEVELS else 0
        levels = [f"level\n{level}" for level in range(shown)]
        headings = ("column", "exact", "invert:\nerror", "largest", *levels)
        table = table_of("States rebuilt from the last column's", headings, left=2)
        for column in thinned(self.columns, 16):
            if column is None:
                table.add_row("...")
                continue
            errors = (column.invert_error, column.invert_max, *column.invert_levels[:shown])
            table.add_row(
                str(column.column),
                Text("bit for bit", COLOURS["exact"]) if column.exact else Text("DIFFERS", COLOURS["wrong"]),
                *(Text(f"{error:.0e}" if error else "0", COLOURS[_grade(error)]) for error in errors),
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
