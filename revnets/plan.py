"""Predicts the memory of a training step without taking it, and turns one dial until the step fits a budget.

The dial is how many cells, counted from the end, keep everything (`ReversibleColumns.stored`): their replay would be
pure waste, because backward comes to them first. Every stored cell saves its own forward in backward and costs its
activations; nothing else trades memory for work in `exact`, so the largest count that fits is the fastest plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from revnets.audit import find_columns
from revnets.columns import ReversibleColumns
from revnets.config import Source
from revnets.footprint import Footprint, simulate
from revnets.frame import Memory
from revnets.net import build
from revnets.report import size
from revnets.spec import NetSpec

OPTIMIZERS = {"none": 0, "sgd": 1, "lion": 1, "adam": 2, "adamw": 2}
"""Tensors of a parameter's size that an optimizer holds; sgd with momentum."""

SHARDINGS = ("ddp", "fsdp")


class PlanError(ValueError):
    """No plan: the request makes no sense, or nothing fits the budget."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes that one rank needs in one memory mode, once training runs."""

    mode: str
    stored: int  # cells at the end that keep everything
    parameters: int  # buffers included
    gradients: int
    optimizer: int
    buckets: int  # what DDP or FSDP2 holds to communicate
    kept: int  # activations between forward and backward
    peak: int  # most bytes alive at once, all of the above included
    flops: int  # of one step, forward and backward
    extra: float  # work of the step against `store`, 1.33 = a third more


@dataclass(frozen=True, slots=True)
class Plan:
    """What each memory mode would take, and the choice under a budget."""

    input_shape: tuple[int, ...]
    dtype: str
    ranks: int
    sharding: str
    modes: tuple[Prediction, ...]
    budget: int | None = None
    chosen: Prediction | None = None  # under the budget

    def apply(self, model: nn.Module) -> None:
        """Set the chosen memory mode on a model."""
        if self.chosen is None:
            raise PlanError("this plan was made without a budget and has chosen nothing; pass budget=")
        columns = find_columns(model)
        columns.memory, columns.stored = self.chosen.mode, self.chosen.stored

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return asdict(self)


def plan(
    model_or_spec: nn.Module | NetSpec | Source,
    input_shape: Sequence[int] | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    ranks: int = 1,
    sharding: str = "ddp",
    budget: int | str | None = None,
    modes: Sequence[str] = tuple(Memory),
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Predict the memory of a training step in each mode; under a budget, choose the fastest that fits.

    Args:
        model_or_spec: a module with reversible columns (also on the meta device), or what `build` takes.
        input_shape: shape of one rank's input, batch first; or an example, of which only shape and dtype matter.
        dtype: float32; bfloat16 or float16 mean autocast with float32 weights.
        optimizer: which states to count, one of `OPTIMIZERS`.
        ranks: processes; with more than one, what `sharding` holds to communicate is counted.
        sharding: `ddp` (replicas), or `fsdp` (`fully_shard` on every cell).
        budget: bytes, or text such as `24GiB`; `Plan.chosen` is the choice.

    Raises:
        PlanError: nothing fits the budget (the message says what the least is and which dial to turn).
    """
    _check(optimizer, ranks, sharding)
    try:
        limit = None if budget is None else parse_bytes(budget)
    except ValueError as error:
        raise PlanError(f"budget {error}") from None
    if isinstance(model_or_spec, nn.Module):
        model = model_or_spec
    else:
        with torch.device("meta"):
            model = build(model_or_spec)
    example = input_shape if isinstance(input_shape, Tensor) else torch.empty(tuple(input_shape), device="meta")
    predictor = _Predictor(model, example, dtype, optimizer, ranks, sharding, progress or (lambda _: None))
    with predictor:
        base = predictor.predict("store", 0)
        rows = tuple(base if mode == "store" else predictor.predict(str(mode), 0, base) for mode in modes)
        result = Plan(tuple(example.shape), str(dtype).removeprefix("torch."), ranks, sharding, rows)
        if limit is None:
            return result
        return replace(result, budget=limit, chosen=_choose(predictor, base, limit, example.shape[0]))


class _Predictor:
    """Simulates steps of one model; its memory modes are put back at the end."""

    def __init__(self, model, example, dtype, optimizer, ranks, sharding, progress):
        self.model, self.example, self.dtype, self.progress = model, example, dtype, progress
        self.optimizer, self.ranks, self.sharded = optimizer, ranks, ranks > 1 and sharding == "fsdp"
        self.columns: ReversibleColumns = find_columns(model)
        self.cells = len(self.columns.graph.nodes)

    def __enter__(self) -> _Predictor:
        self._found = self.columns.memory, self.columns.stored
        return self

    def __exit__(self, *_: Any) -> None:
        self.columns.memory, self.columns.stored = self._found

    def predict(self, mode: str, stored: int, base: Prediction | None = None) -> Prediction:
        self.progress(mode if not stored else f"{mode}, {stored} of {self.cells} cells stored")
        self.columns.memory, self.columns.stored = mode, stored
        try:
            found = simulate(self.model, (self.example,), self.dtype, keep_gradients=not self.sharded)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise PlanError(
                f"an input of {tuple(self.example.shape)} does not go through the net ({reason})"
            ) from error
        flops = base.flops if base else found.flops
        return self._of_one_rank(found, mode, stored, found.flops / max(flops, 1))

    def _of_one_rank(self, found: Footprint, mode: str, stored: int, extra: float) -> Prediction:
        """Add to a single process's footprint what the optimizer and the other ranks bring."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained)
        optimizer = OPTIMIZERS[self.optimizer] * gradients
        activations = found.peak - found.parameters  # gradients among them, unless sharded
        if self.sharded:
            # Each rank holds a share of everything; of two cells at a time (the one that runs and the next, fetched
            # ahead) the whole weights, and of one the whole gradients, which `found` has counted.
            parameters, gradients, optimizer = (
                -(-count // self.ranks) for count in (found.parameters, gradients, optimizer)
            )
            cells = sorted(sum(p.nbytes for p in cell.parameters()) for cell in self.columns.flat())
            buckets = sum(cells[-2:])
            peak = parameters + gradients + optimizer + buckets + activations
        else:
            parameters = found.parameters
            buckets = gradients if self.ranks > 1 else 0
            peak = parameters + optimizer + buckets + activations
        return Prediction(mode, stored, parameters, gradients, optimizer, buckets, found.kept, peak, found.flops, extra)


def _choose(predictor: _Predictor, base: Prediction, budget: int, batch: int) -> Prediction:
    """The most cells that can be stored under the budget, by bisection: memory only grows with them."""
    if base.peak <= budget:
        return base
    least = predictor.predict("exact", 0, base)
    if not _fits(least, budget):
        static = least.parameters + least.gradients + least.optimizer + least.buckets
        sample = max(least.peak - static, 0) // max(batch, 1)
        turn = (
            f"the weights, gradients and optimizer alone take {size(static)}; shard them over more ranks, or take "
            "an optimizer with less state"
            if static > budget
            else f"each of the {batch} samples takes about {size(sample)}; lower the batch, use bfloat16, or shard"
        )
        smallest = size(int(1.01 * least.peak))
        raise PlanError(f"nothing fits {size(budget)}: the smallest peak is {smallest}. Of it, {turn}")
    best, low, high = least, 0, predictor.cells
    while high - low > 1:
        middle = (low + high) // 2
        tried = predictor.predict("exact", middle, base)
        if _fits(tried, budget):
            best, low = tried, middle
        else:
            high = middle
    return best


def _fits(prediction: Prediction, budget: int) -> bool:
    """Lost bits are predicted from what is usual, so a hundredth of the peak is left free for the unusual."""
    return 1.01 * prediction.peak <= budget


def _check(optimizer: str, ranks: int, sharding: str) -> None:
    if optimizer not in OPTIMIZERS:
        raise PlanError(f"optimizer {optimizer!r} is unknown; choose {', '.join(OPTIMIZERS)}")
    if sharding not in SHARDINGS:
        raise PlanError(f"sharding {sharding!r} is unknown; choose {', '.join(SHARDINGS)}")
    if ranks < 1:
        raise PlanError(f"ranks {ranks}: at least one process trains")


_UNITS = {"": 1, "B": 1} | {
    f"{prefix}{binary}B": (1024 if binary else 1000) ** power
    for power, prefix in enumerate("KMGT", 1)
    for binary in ("", "i")
}


def parse_bytes(value: int | str) -> int:
    """Bytes from a whole number or from text such as `24GiB`, `800 MB`.

    Raises:
        ValueError: says what is allowed.
    """
    text = str(value).strip()
    digits = text.rstrip("BKMGTkmgtib ")
    unit = text[len(digits) :].strip()
    try:
        number = float(digits)
        scale = {name.lower(): size for name, size in _UNITS.items()}[unit.lower()]
    except (ValueError, KeyError):
        number, scale = 0.0, 1
    if not 0 < number * scale < float("inf"):
        raise ValueError(f"{value!r} is no amount of memory; write a number of bytes, or for example 24GiB or 800MB")
    return int(number * scale)
