"""Memory of a training step against the number of columns (figure 4 of the paper), predicted and measured."""

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
    """Bytes of one training step without an optimizer.

    Attributes:
        kind: `predicted` or `measured`.
        mode: Memory mode.
        columns: Number of columns.
        batch: Batch size.
        input: Shape of one sample, such as `3x224x224`.
        dtype: Name of the dtype: `float32`, or the autocast dtype.
        parameters: Bytes of parameters and buffers.
        kept: Bytes of activations saved for backward.
        peak: Most bytes alive at once: weights, gradients and activations.
    """

    kind: str
    mode: str
    columns: int
    batch: int
    input: str
    dtype: str
    parameters: int
    kept: int
    peak: int

    @property
    def words(self) -> str:
        """Batch size, input shape and dtype in words."""
        return f"batch {self.batch} of {self.input.replace('x', ' x ')}, {self.dtype}"


@dataclass(frozen=True, slots=True)
class Step:
    """A training step of models that differ in their number of columns.

    Attributes:
        source: Source of `revnets.models.loading.load_model` with the option `columns`.
        overrides: Overrides `key.path=value`.
        columns: Numbers of columns.
        modes: Memory modes.
        shape: Shape of one sample.
        batch: Batch size.
        dtype: float32, or bfloat16 or float16 for autocast.
        trust: Whether a YAML file may name classes of other projects.
    """

    source: str
    overrides: tuple[str, ...]
    columns: tuple[int, ...]
    modes: tuple[str, ...]
    shape: tuple[int, ...]
    batch: int
    dtype: torch.dtype
    trust: bool = True

    def model(self, columns: int, device: str = "cpu") -> nn.Module:
        """Build the model with this number of columns. On the device `meta` it takes no memory."""
        with torch.device(device):
            overrides = [*self.overrides, f"columns={columns}", *self._directions(columns)]
            return load_model(self.source, overrides, trust=self.trust)

    def _directions(self, columns: int) -> list[str]:
        """Return overrides that preserve the fraction of columns that run down, if there are any."""
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
        """Return a point of this step."""
        shape, dtype = "x".join(map(str, self.shape)), str(self.dtype).removeprefix("torch.")
        return Point(kind, mode, columns, self.batch, shape, dtype, parameters, kept, peak)


def predicted(step: Step, tell: Callable[[str], None] = lambda _: None) -> Iterator[Point]:
    """Predict the memory for each number of columns and mode, on the meta device.

    Args:
        step: The training step.
        tell: Called with a description of each prediction before it starts.

    Raises:
        revnets.SpecError: If the model has no reversible columns or rejects the input.
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
    """Measure the memory for each number of columns and mode, by real steps on the CPU.

    `revnets.MemoryTracker` counts every byte of every tensor.

    Args:
        step: The training step.
        tell: Called with a description of each measurement before it starts.

    Raises:
        revnets.SpecError: If the model rejects the input.
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
    """Run forward and backward on the CPU; return bytes of weights, bytes saved for backward, and peak bytes."""
    with MemoryTracker() as tracker, warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # gradients do not matter here
        tracker.register(model)
        parameters = tracker.live
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = total(model(x))
        kept = tracker.live - parameters
        loss.backward()
    return parameters, kept, tracker.peak


def _unfit(step: Step, error: BaseException) -> SpecError:
    reason = str(error).splitlines()[0].removesuffix(".")
    problem = f"the model rejects an input of shape {step.shape} ({reason})"
    return SpecError(
        step.source, "", problem, "Give --input, and --measure-input for the small step", code="input-rejected"
    )


def _require_columns(model: nn.Module, source: str) -> None:
    try:
        find_columns(model)
    except ValueError as error:
        raise SpecError(source, "", str(error), code="no-columns") from None


def table(points: Sequence[Point]) -> list[dict[str, str]]:
    """Return a row per number of columns for the terminal."""
    rows: dict[int, dict[str, str]] = {}
    for point in points:
        row = rows.setdefault(point.columns, {"columns": str(point.columns), "weights": size(point.parameters)})
        row |= {f"{point.mode}\nkept": size(point.kept), f"{point.mode}\npeak": size(point.peak)}
    return list(rows.values())
