"""How F_t is combined with x_{t-m}: the coupling, its inverse, and the three couplings that a cell is called with.

A cell computes F_t and gamma_t and passes both to its coupling, which holds x_{t-m} and returns x_t.

| coupling | source of x_{t-m} | side effect |
| --- | --- | --- |
| `PlainCoupling` | the caller | none |
| `RecordingCoupling` | the caller | records what backward needs to recover x_{t-m} |
| `ReplayCoupling` | the tape, or rebuilt from x_t | puts x_{t-m} into the window of the tape |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from revnets.engine import lost_bits
from revnets.engine.cell_record import CellRecord, Held, is_unchanged, with_stride
from revnets.engine.errors import ArgumentError, ReplayError
from revnets.engine.memory_mode import Memory

if TYPE_CHECKING:
    from revnets.engine.tape import Tape


def add(past: Tensor, update: Tensor, gamma: Tensor | float) -> Tensor:
    """Return x_t = F_t + gamma * x_{t-m} in the dtype of x_{t-m}."""
    update = update.to(past.dtype)
    if not isinstance(gamma, Tensor):
        return update + past if gamma == 1.0 else torch.add(update, past, alpha=gamma)
    return torch.addcmul(update, gamma.to(past.dtype), past)


def subtract(state: Tensor, update: Tensor, gamma: Tensor | float) -> Tensor:
    """Return x_{t-m} = (x_t - F_t) / gamma, up to rounding."""
    difference = state - update.to(state.dtype)
    if not isinstance(gamma, Tensor):
        return difference if gamma == 1.0 else difference.div_(gamma)
    return difference.div_(gamma.to(state.dtype))


def _is_zero(gamma: Tensor | float) -> bool:
    """Whether x_t does not contain x_{t-m}, which must then be kept. A learned gamma is never 0 (`Gain`)."""
    return not isinstance(gamma, Tensor) and gamma == 0.0


class PlainCoupling:
    """Computes x_t from x_{t-m} and keeps nothing for backward.

    Args:
        cell: Short name of the cell, such as "c1.l0".
        past: x_{t-m}.
        name: Name of the cell in error messages; by default the short name.
    """

    def __init__(self, cell: str, past: Tensor, name: str = ""):
        self.cell = cell
        self.past = past
        self.name = name or cell

    def __call__(self, update: Tensor, gamma: Tensor | float) -> Tensor:
        if update.shape != self.past.shape:
            raise ArgumentError(
                f"{self.name} returns a tensor of shape {tuple(update.shape)}, but the state x_(t-m) that it is added "
                f"to has shape {tuple(self.past.shape)}; both must be equal",
                self.cell,
                code="shape-mismatch",
            )
        return add(self.past, update, gamma)


class RecordingCoupling(PlainCoupling):
    """Computes x_t from x_{t-m}, and records what the memory mode needs to recover x_{t-m}.

    `store` and `recompute` keep x_{t-m}, `exact` keeps its lost bits, `invert` keeps nothing. All modes keep x_{t-m}
    if gamma is 0, and so does `exact` if the lost bits are no smaller.

    Args:
        cell: Short name of the cell, such as "c1.l0".
        past: x_{t-m}.
        name: Name of the cell in error messages.
        record: Of this call of the cell.
    """

    def __init__(self, cell: str, past: Tensor, name: str, record: CellRecord):
        super().__init__(cell, past, name)
        self.record = record
        self._made: tuple[Tensor, int] | None = None  # x_t and its version

    def __call__(self, update: Tensor, gamma: Tensor | float) -> Tensor:
        past, record = self.past, self.record
        state = super().__call__(update, gamma)
        record.past_stride, record.past_grad = past.stride(), past.requires_grad
        if record.mode in (Memory.STORE, Memory.RECOMPUTE) or _is_zero(gamma):
            record.kept = Held.of(past)
        elif record.mode is Memory.EXACT:
            with torch.no_grad():
                rebuilt = with_stride(subtract(state, update, gamma), past.stride())
                result = with_stride(state.detach(), past.stride())
                record.lost = lost_bits.encode(past.detach(), rebuilt, result, gamma)
            if record.lost is None or record.lost.is_pending:
                record.kept = Held.of(past)
        self._made = self._made or (state, state._version)
        return state

    def check(self, state: Tensor) -> None:
        """Check that the cell returned x_t unchanged.

        Args:
            state: The tensor that the cell returned.

        Raises:
            ReplayError: If the cell returned something else, or never called its coupling.
        """
        if self._made is None:
            raise ReplayError(
                f"{self.name} has a residual, but its forward never calls `couple`, so x_(t-m) is lost and cannot be "
                "recovered. Return couple(update, gain), as `revnets.Cell` does",
                code="not-coupled",
                cell=self.cell,
            )
        if not is_unchanged(state, *self._made):
            raise ReplayError(
                f"{self.name} changed its output after the residual was added (in a forward hook?). This cannot be "
                "inverted; register the hook on `cell.function`",
                code="output-changed",
                cell=self.cell,
            )


class ReplayCoupling:
    """Takes x_{t-m} from the tape or rebuilds it from x_t, and recomputes x_t where needed.

    With a learned gamma, x_t is recomputed so that autograd saves the operands of the product again.

    Args:
        tape: Of the pass.
        record: Of the cell that is replayed.
    """

    def __init__(self, tape: Tape, record: CellRecord):
        self.tape = tape
        self.record = record

    def __call__(self, update: Tensor, gamma: Tensor | float) -> Tensor:
        past = self.tape.find_past(self.record)
        if past is None:
            past = self._rebuild(update.detach(), gamma)
            self.tape.put_back(self.record, past)
        if not isinstance(gamma, Tensor) and self.tape.verifier is None:
            return past  # a sum with a fixed gamma saves nothing, and x_t is not used
        return add(past.detach().requires_grad_(self.record.past_grad), update, gamma)

    @torch.no_grad()
    def _rebuild(self, update: Tensor, gamma: Tensor | float) -> Tensor:
        """Return x_{t-m} with its original strides (Rule 4)."""
        state, stride = self.tape.state(self.record.node.index), self.record.past_stride
        past = with_stride(subtract(state, update, gamma), stride)
        lost = self.record.lost if self.tape.host is None else self.tape.host.lost_bits_of(self.record)
        if lost is not None:
            lost.decode(past, with_stride(state, stride), gamma)
        return past
