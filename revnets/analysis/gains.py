"""The gains gamma of a model or of a file of weights, and the lost bits that they cost.

The inverse divides by gamma, which magnifies the rounding error of x_t = F_t + gamma x_{t-m}: the smaller |gamma|, the
more lost bits mode `exact` saves (`engine/lost_bits`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnets.config.errors import SpecError
from revnets.engine import lost_bits as lostbits
from revnets.engine.columns_group import find_columns
from revnets.engine.coupling import add, subtract
from revnets.models.loading import load_model
from revnets.utils.checkpoint_io import RECORDS, CheckpointReadError, read_checkpoint

BEST = ("checkpoints/best.pt", "best.pt", "checkpoint_best.pt")
"""Weights in the directory of a run of `revnets train` or fairseq, best first."""

AVERAGED, OWN = ("ema", "state_dict_ema"), ("model", "state_dict")
"""Keys of averaged weights in checkpoints, and keys of the weights of the model."""

MIN_ABS = 1e-3
"""Default lower bound of |gamma|, because files do not contain the bound."""

SAMPLES = 2**16
"""Elements of the state of a cell on which lost bits are measured."""

MAX_CELLS, MAX_CHANNELS = 1000, 2**20
"""Largest number of cells and channels in a file. A cell takes 5 ms to measure, a channel 5 us."""

_GAIN = re.compile(r"(?:.*\.)?cells\.(\d+)\.(\d+)\.gain\.weight")


class CellGains(NamedTuple):
    """Gains of one cell.

    Attributes:
        column: Index of the column.
        level: Index of the level.
        gamma: |gamma| of every channel, float64. A single number if gamma is not learned.
    """

    column: int
    level: int
    gamma: Tensor


class Bits(NamedTuple):
    """Lost bits per element of a state.

    Attributes:
        expected: Expected number (`lostbits.expected_bytes`).
        kept: Number that mode `exact` saves for states and updates drawn from N(0, 1).
        entropy: Lower bound for any code: entropy given the window that rounding leaves.
    """

    expected: float
    kept: float
    entropy: float


def read_gains(source: str, overrides: Sequence[str] = (), trust: bool = True) -> list[CellGains]:
    """Read the gains of every cell. The cells of the first column have none.

    Args:
        source: File of weights (.safetensors or `torch.save`; averaged weights are preferred), directory of a run, or
            any source of `revnets.models.loading.load_model`.
        overrides: Overrides of a model. Not valid for weights.
        trust: Whether a YAML file may name classes of other projects.

    Returns:
        Gains in the order of columns and levels.

    Raises:
        revnets.SpecError: If the source does not exist, cannot be read or has no gains.
    """
    path = Path(source)
    if path.suffix.lower() in (".yaml", ".yml") or not path.exists():
        gains = gains_of(load_model(source, overrides, trust=trust), source)
    elif overrides:
        raise SpecError(
            source, "", f"weights have no options such as {overrides[0]}", "Remove them", code="invalid-override"
        )
    else:
        gains = gains_in(_content(_file(path)))
        _require_measurable(gains, source)
    if not gains:
        raise SpecError(
            source,
            "",
            "there are no gains: no cells after the first column",
            "Give a model with several columns",
            code="no-columns",
        )
    return gains


def gains_of(model: nn.Module, name: str = "model") -> list[CellGains]:
    """Return the gains of a model with reversible columns.

    Args:
        model: Module with reversible columns.
        name: Name of the model in errors.

    Raises:
        revnets.SpecError: If the model has no reversible columns.
    """
    try:
        group = find_columns(model)
    except ValueError as error:
        raise SpecError(name, "", str(error), code="no-columns") from None
    found = []
    for columns, first in zip(group, group.first_columns, strict=True):
        for node, cell in zip(columns.graph.nodes, columns.flat(), strict=True):
            if cell.gain is not None:
                gamma = torch.as_tensor(cell.gamma()).detach().double().abs().flatten()
                found.append(CellGains(first + node.column, node.level, gamma))
    return found


def gains_in(content: Any) -> list[CellGains]:
    """Return the gains in the content of a file of weights: a dict of tensors, or a checkpoint of such dicts."""
    if not isinstance(content, Mapping):
        return []
    found = []
    for key in (*AVERAGED, *OWN):
        if isinstance(content.get(key), Mapping) and (found := gains_in(content[key])):
            return found
    for name, tensor in content.items():
        if isinstance(name, str) and isinstance(tensor, Tensor) and (match := _GAIN.fullmatch(name)):
            gamma = tensor.detach().real.double().abs().clamp_min(MIN_ABS).flatten()
            found.append(CellGains(int(match[1]), int(match[2]), gamma))
    return sorted(found, key=lambda cell: (cell.column, cell.level))


def _require_measurable(gains: Sequence[CellGains], source: str) -> None:
    """Reject gains of a file that are too many, empty or not finite, before the measurement."""
    problem = ""
    channels = sum(len(cell.gamma) for cell in gains)
    if len(gains) > MAX_CELLS or channels > MAX_CHANNELS:
        problem = (
            f"there are gains of {len(gains):,} cells and {channels:,} channels, but at most {MAX_CELLS:,} cells and "
            f"{MAX_CHANNELS:,} channels can be measured"
        )
    for cell in gains:
        place = f"the gain of column {cell.column}, level {cell.level}"
        if not len(cell.gamma):
            problem = f"{place} has no channels"
        elif not bool(cell.gamma.isfinite().all()):
            problem = f"{place} is not finite"
    if problem:
        raise SpecError(source, "", problem, "Give a checkpoint of a model", code="wrong-format")


def lost_bits(gamma: Tensor, samples: int = SAMPLES) -> Bits:
    """Measure the lost bits that gains cost per element of a float32 state.

    Args:
        gamma: |gamma| of every channel.
        samples: Approximate number of random elements.
    """
    expected = 8 * float(lostbits.expected_bytes(gamma.numpy()).mean())
    generator = torch.Generator().manual_seed(0)
    shape = (math.ceil(samples / len(gamma)), len(gamma))
    past, update = (torch.randn(shape, generator=generator) for _ in range(2))
    gain = gamma.float()
    state = add(past, update, gain)
    rebuilt = subtract(state, update, gain)
    difference = lostbits.bits_of(past) - lostbits.bits_of(rebuilt)
    window = state.frexp().exponent - rebuilt.frexp().exponent - gain.frexp().exponent
    lost = lostbits.encode(past, rebuilt, state, gain)
    kept = 8 * (past if lost is None else lost).nbytes / past.numel()
    return Bits(expected, kept, _entropy(difference, window.flatten()))


def _entropy(numbers: Tensor, known: Tensor) -> float:
    """Return the entropy in bits of int32 numbers, given `known`."""
    pairs, counts = ((known.long() << 32) + numbers).unique(return_counts=True)
    place = (pairs + 2**31 >> 32) - known.min()
    totals = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, counts.double())
    return float(-(counts * (counts / totals[place]).log2()).sum() / len(numbers))


def rows(cells: Sequence[CellGains], bits: Sequence[Bits]) -> list[dict[str, int | float]]:
    """Return a row per cell for a CSV file: quantiles of |gamma|, and lost bits."""
    return [
        {"column": cell.column, "level": cell.level, "channels": len(cell.gamma)}
        | _quantiles(cell.gamma)
        | {"bits_expected": found.expected, "bits_kept": found.kept, "bits_entropy": found.entropy}
        for cell, found in zip(cells, bits, strict=True)
    ]


def table(cells: Sequence[CellGains], bits: Sequence[Bits]) -> list[dict[str, str]]:
    """Return a row per column for the terminal. Lost bits are the mean over the levels."""
    result = []
    for column in sorted({cell.column for cell in cells}):
        of_column = [pair for pair in zip(cells, bits, strict=True) if pair[0].column == column]
        spread = _quantiles(torch.cat([cell.gamma for cell, _ in of_column]))
        kept = sum(found.kept for _, found in of_column) / len(of_column)
        row = {"column": str(column), **{name: f"{value:.3g}" for name, value in spread.items()}}
        result.append({**row, "lost bits": f"{kept:.2f}"})
    return result


def _quantiles(gamma: Tensor) -> dict[str, float]:
    names = ("min", "q25", "median", "q75", "max")
    return dict(zip(names, gamma.quantile(gamma.new_tensor([0, 0.25, 0.5, 0.75, 1])).tolist(), strict=True))


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in BEST:
        if (path / name).is_file():
            return path / name
    raise SpecError(
        str(path), "", f"the directory contains none of {', '.join(BEST)}", "Give a file of weights", "missing-file"
    )


def _content(path: Path) -> Any:
    """Return the content of a file without executing code in it."""
    try:
        return read_checkpoint(path, allowed=RECORDS)  # checkpoints of fairseq contain NumPy records
    except CheckpointReadError as error:
        hint = "revnets convert reads official files" if error.code == "unsafe-file" else error.hint
        raise SpecError(str(path), "", error.message, hint, code=error.code) from None
