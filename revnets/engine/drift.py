"""Predicts the error of the gradients of `invert`, and warns if it is too large (docs/concepts/numerical-drift.md).

Rebuilding a column divides its rounding errors by gamma at each level. Each earlier column multiplies the accumulated
error by g, the mean of 1 / gamma^2: once by 1 / gamma in the division, and once more because cells that read an
inaccurate state compute from it. For n columns of equal gain, counted from the last one,

    error = 2 u / gamma (g + g^2 + ... + g^(n-1)),    u = unit roundoff of the dtype.

This agrees with measured curves over columns, gamma and dtype to an order of magnitude. Under autocast, the first
rounding is that of the states: cells that read exact states repeat their computation exactly.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from revnets.engine.cell import Cell
from revnets.engine.graph import Graph
from revnets.engine.memory_mode import Memory
from revnets.engine.torch_internals import has_values, without_dynamo

EVERY = 1000
"""Forward passes between two checks of learned gains."""

_FACTOR = 2.0  # fitted to measured curves, see tests/revnets/engine/test_drift.py


class DriftWarning(UserWarning):
    """The rounding errors of `invert` are predicted to change the gradient by more than 1 %."""


class Columns(Protocol):
    """The attributes of `revnets.ReversibleColumns` that `watch` uses."""

    graph: Graph

    @property
    def memory(self) -> tuple[Memory, ...]: ...
    @property
    def stored(self) -> frozenset[int]: ...
    def flat(self) -> list[Cell]: ...


def predict_drift(
    modes: Sequence[Memory | str],
    magnification: Sequence[float],
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
) -> float:
    """Predict the error of the gradients that the rounding errors of `invert` cause.

    Args:
        modes: Memory mode of each column. `store` and `recompute` keep the states of the previous column, so the
            error restarts at 0 there. `exact` adds no error, but magnifies the error of later columns.
        magnification: Mean of gamma^-2 of each column. The value of the first column, which has no gain, is ignored.
        dtype: dtype of the states.
        autocast: dtype of the cells' computation under autocast, or None without autocast.

    Returns:
        Relative L2 error of all gradients, at most 1.

    Example:
        >>> error = revnets.predict_drift(["invert"] * 12, [4.0] * 12)  # gamma = 0.5, float32
    """
    error = largest = 0.0
    for column in reversed(range(1, len(modes))):
        if modes[column] in (Memory.STORE, Memory.RECOMPUTE):
            error = 0.0
            continue
        gain, rounding = magnification[column], dtype if autocast is None or error == 0 else autocast
        added = _FACTOR * torch.finfo(rounding).eps / 2 * gain**0.5 if modes[column] == Memory.INVERT else 0.0
        error = min(1.0, gain * (error + added))
        if modes[column - 1] != Memory.STORE:  # otherwise nothing is recomputed from these states
            largest = max(largest, error)
    return largest


@without_dynamo
def watch(columns: Columns, x: Tensor) -> None:
    """Warn once per setting of `columns.memory` if the predicted drift exceeds `INVERT_LIMIT`.

    Gains are checked in the first forward pass and every `EVERY` passes. The host never waits for a GPU: gains are
    copied asynchronously and evaluated in a later forward pass.
    """
    if not has_values(x):
        return
    now = _watches.get(columns)
    if now is None or now.memory is not columns.memory:
        now = _watches[columns] = _Watch(columns.memory)
    if now.warned:
        return
    if now.calls % EVERY == 0:
        now.coming, now.arrived = _fetch(_magnification(columns))
    now.calls += 1
    if now.coming is not None and (now.arrived is None or now.arrived.query()):
        magnification, now.coming = now.coming.numpy().tolist(), None
        now.warned = _judge(columns, [1.0, *magnification], x.dtype, _autocast(x))


@dataclass
class _Watch:
    memory: tuple[Memory, ...]
    calls: int = 0
    coming: Tensor | None = None  # being copied to the host
    arrived: torch.Event | None = None
    warned: bool = False


_watches: WeakKeyDictionary[Columns, _Watch] = WeakKeyDictionary()


@torch.no_grad()
def _magnification(columns: Columns) -> Tensor:
    """Return the mean of gamma^-2 of every column but the first, on the device of the gains."""
    means: list[Tensor] = []
    cells, m = columns.flat(), columns.graph.m
    for start in range(m, len(cells), m):
        gains = [cell.gamma() for cell in cells[start : start + m] if cell.gain is not None] or [1.0]
        gains = [getattr(gain, "to_local", lambda gain=gain: gain)() for gain in gains]  # the local shard, if sharded
        means.append(torch.stack([torch.as_tensor(gain).float().pow(-2).mean() for gain in gains]).nanmean())
    return torch.stack(means) if means else torch.empty(0)


def _fetch(values: Tensor) -> tuple[Tensor, torch.Event | None]:
    if values.device.type == "cpu":
        return values, None
    copy, arrived = values.to("cpu", non_blocking=True), torch.Event(values.device)
    arrived.record()
    return copy, arrived


def _autocast(x: Tensor) -> torch.dtype | None:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _judge(columns: Columns, magnification: list[float], dtype: torch.dtype, autocast: torch.dtype | None) -> bool:
    """Warn if the predicted drift exceeds the limit; return True if so."""
    replayed = {node.column for node in columns.graph.nodes if node.index not in columns.stored}
    modes = [mode if column in replayed else Memory.STORE for column, mode in enumerate(columns.memory)]
    if autocast is not None:
        dtype = torch.promote_types(dtype, torch.float32)  # states are at least float32 under autocast
    error = predict_drift(modes, magnification, dtype, autocast)
    if error <= INVERT_LIMIT:
        return False
    typical = sorted(magnification[1:])[(len(magnification) - 1) // 2]
    lengths = range(2, columns.graph.columns)
    run = takewhile(lambda n: predict_drift(["invert"] * n, [typical] * n, dtype, autocast) <= INVERT_LIMIT, lengths)
    safe = 1 + sum(1 for _ in run)  # columns from one recomputed column to the next
    alternative = f", or 'recompute' in one column out of {safe}" if safe > 1 else ""
    warnings.warn(
        f"memory 'invert': rounding errors over {columns.graph.columns} columns (gamma about {typical**-0.5:.2g}, "
        f"{str(autocast or dtype).removeprefix('torch.')}) are predicted to change the gradient by about {error:.0%}, "
        f"more than {INVERT_LIMIT:.0%}. Use memory 'exact', which does not drift{alternative}",
        DriftWarning,
        stacklevel=2,
    )
    return True


INVERT_LIMIT = 0.01
"""Relative gradient error above which `invert` warns."""
