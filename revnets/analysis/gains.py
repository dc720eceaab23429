"""The gains gamma of a net, of a model or out of a file of weights, and what they cost in lost bits.

Dividing by gamma in the inverse magnifies what x_t = F_t + gamma x_{t-m} has rounded away: the smaller |gamma|, the
more bits `exact` keeps (`engine/lost_bits`).
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
"""What is meant by the folder of a run: of `revnets train`, of fairseq."""

AVERAGED, OWN = ("ema", "state_dict_ema"), ("model", "state_dict")
"""Where checkpoints keep averaged weights, and where those of the model."""

MIN_ABS = 1e-3
"""The bound of |gamma| that nets have unless told otherwise; files do not say."""

SAMPLES = 2**16
"""Elements of a cell's state on which lost bits are measured."""

MAX_CELLS, MAX_CHANNELS = 1000, 2**20
"""Of all gains in a file; each cell takes 5 ms to measure, each channel 5 us."""

_GAIN = re.compile(r"(?:.*\.)?cells\.(\d+)\.(\d+)\.gain\.weight")


class CellGains(NamedTuple):
    """Of one cell."""

    column: int
    level: int
    gamma: Tensor  # |gamma| of every channel, float64; one number if it is not learned


class Bits(NamedTuple):
    """Lost bits of an element of a state."""

    expected: float  # what `exact` is expected to keep (`lostbits.expected_bytes`)
    kept: float  # what it keeps of states and updates that are drawn from N(0, 1)
    entropy: float  # the least that any code could keep of these, with the window known that rounding leaves


def read_gains(source: str, overrides: Sequence[str] = (), trust: bool = True) -> list[CellGains]:
    """The gains of every cell but those of the first column, which has none.

    Args:
        source: a file of weights (.safetensors, or of `torch.save`: averaged weights are taken if there are any) or the
            folder of a run, of whatever net; or what `revnets.models.loading.load_model` knows.
        overrides: of the latter.
        trust: may a YAML name classes of other projects?

    Raises:
        revnets.SpecError: there is no such thing, it cannot be read, or it has no gains.
    """
    path = Path(source)
    if path.suffix.lower() in (".yaml", ".yml") or not path.exists():
        gains = gains_of(load_model(source, overrides, trust=trust), source)
    elif overrides:
        raise SpecError(
            source, "", f"weights take no options, such as {overrides[0]}", "Leave them out", code="invalid-override"
        )
    else:
        gains = gains_in(_content(_file(path)))
        _require_measurable(gains, source)
    if not gains:
        raise SpecError(
            source,
            "",
            "it has no gains: no cells past a first column",
            "Give a net of several columns",
            code="no-columns",
        )
    return gains


def gains_of(model: nn.Module, name: str = "model") -> list[CellGains]:
    """Of a model with reversible columns.

    Raises:
        revnets.SpecError: it has none.
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
    """In what a file of weights holds: a dict of tensors, or a checkpoint with such dicts."""
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
    """Refuse gains out of a file that are too many or no numbers, before time is spent on them."""
    problem = ""
    channels = sum(len(cell.gamma) for cell in gains)
    if len(gains) > MAX_CELLS or channels > MAX_CHANNELS:
        problem = (
            f"gains of {len(gains):,} cells and {channels:,} channels; at most {MAX_CELLS:,} cells and "
            f"{MAX_CHANNELS:,} channels are measured"
        )
    for cell in gains:
        place = f"the gain of column {cell.column}, level {cell.level}"
        if not len(cell.gamma):
            problem = f"{place} is for no channels"
        elif not bool(cell.gamma.isfinite().all()):
            problem = f"{place} is not finite"
    if problem:
        raise SpecError(source, "", problem, "Give a checkpoint of a net", code="wrong-format")


def lost_bits(gamma: Tensor, samples: int = SAMPLES) -> Bits:
    """What gains cost per element of a float32 state.

    Args:
        gamma: |gamma| of every channel.
        samples: about how many elements are drawn.
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
    """Bits that an int32 takes on average where `known` is known of it."""
    pairs, counts = ((known.long() << 32) + numbers).unique(return_counts=True)
    place = (pairs + 2**31 >> 32) - known.min()
    totals = torch.zeros(int(place.max()) + 1, dtype=torch.float64).index_add_(0, place, counts.double())
    return float(-(counts * (counts / totals[place]).log2()).sum() / len(numbers))


def rows(cells: Sequence[CellGains], bits: Sequence[Bits]) -> list[dict[str, int | float]]:
    """A row for each cell: quantiles of |gamma|, and lost bits."""
    return [
        {"column": cell.column, "level": cell.level, "channels": len(cell.gamma)}
        | _quantiles(cell.gamma)
        | {"bits_expected": found.expected, "bits_kept": found.kept, "bits_entropy": found.entropy}
        for cell, found in zip(cells, bits, strict=True)
    ]


def table(cells: Sequence[CellGains], bits: Sequence[Bits]) -> list[dict[str, str]]:
    """A row for each column, for people; lost bits are the mean over its levels."""
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
        str(path), "", f"this folder has none of {', '.join(BEST)}", "Give a file of weights", code="missing-file"
    )


def _content(path: Path) -> Any:
    """What a file holds; nothing in it is executed."""
    try:
        return read_checkpoint(path, allowed=RECORDS)  # fairseq's checkpoints have such
    except CheckpointReadError as error:
        hint = "revnets convert reads official files" if error.code == "unsafe-file" else error.hint
        raise SpecError(str(path), "", error.message, hint, code=error.code) from None
