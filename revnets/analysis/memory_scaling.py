"""How the memory of a training step grows with the number of columns (figure 4): predicted, and measured."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from revnets.config.errors import SpecError
from revnets.config.net_spec import load_spec
from revnets.engine.columns_group import find_columns
from revnets.engine.drift import DriftWarning
from revnets.memory.simulation import total
from revnets.memory.tracker import MemoryTracker
from revnets.models.loading import load_model
from revnets.models.plan import PlanError, plan
from revnets.utils.format import size


@dataclass(frozen=True, slots=True)
class Point:
    """Bytes of one training step, without an optimizer."""

    kind: str  # predicted or measured
    mode: str
    columns: int
    batch: int
    input: str  # shape of a sample
    dtype: str
    parameters: int
    kept: int  # activations between forward and backward
    peak: int  # most bytes alive at once: weights, gradients, activations

    @property
    def words(self) -> str:
        """What step it is about."""
        return f"batch {self.batch} of {self.input.replace('x', ' x ')}, {self.dtype}"


@dataclass(frozen=True, slots=True)
class Step:
    """A training step of nets that differ in their number of columns."""

    source: str  # what `revnets.models.loading.load_model` knows, and takes `columns=`
    overrides: tuple[str, ...]
    columns: tuple[int, ...]
    modes: tuple[str, ...]
    shape: tuple[int, ...]  # of one sample
    batch: int
    dtype: torch.dtype  # other than float32 mean autocast
    trust: bool = True  # may a YAML name classes of other projects?

    def model(self, columns: int, device: str = "cpu") -> nn.Module:
        """The net with that many columns; on the device `meta` it takes no memory."""
        with torch.device(device):
            overrides = [*self.overrides, f"columns={columns}", *self._directions(columns)]
            return load_model(self.source, overrides, trust=self.trust)

    def _directions(self, columns: int) -> list[str]:
        """Overrides for a net with columns that run down: as large a part of them does so, whatever their number."""
        if Path(self.source).suffix.lower() not in (".yaml", ".yml"):
            return []
        spec = load_spec(self.source, self.overrides, trust=self.trust)
        if "down" not in spec.directions:
            return []
        directions = [spec.directions[column * spec.columns // columns] for column in range(columns)]
        overrides = [f"direction=[{', '.join(directions)}]"]
        if spec.constant is not None:
            column = -(-spec.constant.column * columns // spec.columns)
            overrides.append(f"constant.column={min(column, columns - 1)}")
        return overrides

    def point(self, kind: str, mode: str, columns: int, parameters: int, kept: int, peak: int) -> Point:
        """What was found about it."""
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return Point(kind, mode, columns, self.batch, shape, dtype, parameters, kept, peak)


def predicted(step: Step, tell: Callable[[str], None] = lambda _: None) -> Iterator[Point]:
    """A point for each number of columns and mode, without building a net.

    Args:
        step: what is predicted.
        tell: is told what comes next.

    Raises:
        revnets.SpecError: the input does not go through the net.
    """
    for count in step.columns:
        tell(f"predicting {count} column{'s' * (count > 1)}")
        model = step.model(count, "meta")
        _require_columns(model, step.source)
        try:
            found = plan(model, (step.batch, *step.shape), dtype=step.dtype, optimizer="none", modes=step.modes)
        except PlanError as error:
            raise _unfit(step, error.__cause__ or error) from error
        for mode in found.modes:
            yield step.point("predicted", mode.mode, count, mode.parameters, mode.kept, mode.peak)


def measured(step: Step, tell: Callable[[str], None] = lambda _: None) -> Iterator[Point]:
    """The same by real steps on the CPU; every byte of every tensor is counted (`revnets.MemoryTracker`).

    Raises:
        revnets.SpecError: the input does not go through the net.
    """
    for count, mode in product(step.columns, step.modes):
        tell(f"measuring {count} column{'s' * (count > 1)}, {mode}")
        torch.manual_seed(0)
        model = step.model(count)
        with find_columns(model).using(modes=mode, stored=0):
            try:
                found = step_bytes(model, torch.randn(step.batch, *step.shape), step.dtype)
            except (RuntimeError, ValueError) as error:
                raise _unfit(step, error) from error
        yield step.point("measured", mode, count, *found)


def step_bytes(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> tuple[int, int, int]:
    """Bytes of parameters and buffers, bytes kept for backward, and the peak of a forward and backward on the CPU."""
    with MemoryTracker() as tracker, warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # bytes are looked at, not gradients
        tracker.register(model)
        parameters = tracker.live
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = total(model(x))
        kept = tracker.live - parameters
        loss.backward()
    return parameters, kept, tracker.peak


def _unfit(step: Step, error: BaseException) -> SpecError:
    reason = str(error).splitlines()[0].removesuffix(".")
    problem = f"an input of {step.shape} does not go through ({reason})"
    return SpecError(
        step.source, "", problem, "Give --input, and --measure-input for the small step", code="input-rejected"
    )


def _require_columns(model: nn.Module, source: str) -> None:
    try:
        find_columns(model)
    except ValueError as error:
        raise SpecError(source, "", str(error), code="no-columns") from None


def table(points: Sequence[Point]) -> list[dict[str, str]]:
    """A row for each number of columns, for people."""
    rows: dict[int, dict[str, str]] = {}
    for point in points:
        row = rows.setdefault(point.columns, {"columns": str(point.columns), "weights": size(point.parameters)})
        row |= {f"{point.mode}\nkept": size(point.kept), f"{point.mode}\npeak": size(point.peak)}
    return list(rows.values())
