"""Predicts what a training step of a module takes, and chooses stored cells and recomputed columns that fit a memory
budget.

First, some cells keep everything (`ReversibleColumns.stored`): each saves its own replay in backward and costs its
activations until backward comes to it. `store_selection.py` says in which order cells are worth it. Then, where there
is room left, columns keep their states (mode `recompute`) in place of their lost bits, which spares the coding, and
with fixed gains the end of each replay; columns near the end first, because backward is soon done with them. How many
fit is found by bisection with simulated steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnets.config.memory_budget import OPTIMIZERS, SHARDINGS
from revnets.engine.columns_group import find_columns
from revnets.engine.memory_mode import Memory
from revnets.memory.simulation import Footprint, simulate
from revnets.memory.store_selection import Cost, costs_of_cells, order
from revnets.utils.format import size


class PlanError(ValueError):
    """No plan: the request makes no sense, or nothing fits the budget.

    Attributes:
        key: the argument that it is about.
        code: the kind of error, one of `revnets.config.error_codes.CODES`.
    """

    def __init__(self, message: str, key: str = "", code: str = "invalid-value"):
        super().__init__(message)
        self.key, self.code = key, code


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes that one rank needs in one memory mode, once training runs."""

    mode: str
    stored: tuple[int, ...]  # indices of the cells that keep everything
    recomputed: tuple[int, ...]  # columns that keep their states, as in mode `recompute`
    parameters: int  # buffers included
    gradients: int
    optimizer: int
    buckets: int  # what DDP or FSDP2 holds to communicate
    kept: int  # activations between forward and backward
    peak: int  # most bytes alive at once, all of the above included
    flops: int  # of one step, forward and backward
    extra: float  # work of the step against `store`, 1.33 = a third more

    @property
    def name(self) -> str:
        return _name(self.mode, self.stored, self.recomputed)

    def memory(self, columns: int) -> list[str]:
        """The memory mode of each column."""
        return _memory(self.mode, self.recomputed, columns)


def _name(mode: str, stored: Collection[int], recomputed: Collection[int]) -> str:
    parts = [(stored, "cell", "stored"), (recomputed, "column", "recomputed")]
    said = [f"{len(part)} {noun}{'s' if len(part) > 1 else ''} {verb}" for part, noun, verb in parts if part]
    return ", ".join([mode, *said])


def _memory(mode: str, recomputed: Collection[int], columns: int) -> list[str]:
    return [Memory.RECOMPUTE if column in recomputed else mode for column in range(columns)]


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
            raise PlanError(
                "this plan was made without a budget and has chosen nothing; pass budget=",
                "budget",
                code="missing-budget",
            )
        columns = find_columns(model)
        columns.memory, columns.stored = self.chosen.memory(columns.column_count), self.chosen.stored

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, for JSON."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What was chosen under the budget, and what it costs."""
        chosen = self.chosen
        if chosen is None or self.budget is None:
            return ""
        extra = f"{chosen.extra - 1:.0%} more work than keeping everything" if chosen.extra > 1 else "no extra work"
        return f"Chosen for {size(self.budget)}: {chosen.name}, peak {size(chosen.peak)}, {extra}."


def plan_module(
    model: nn.Module,
    inputs: tuple[Any, ...],
    *,
    dtype: torch.dtype = torch.float32,
    optimizer: str | int = "adamw",
    ranks: int = 1,
    sharding: str = "ddp",
    grad_accum: int = 1,
    budget: int | Memory | None = None,
    modes: Sequence[str] = tuple(Memory),
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """The plan of a module; `revnets.plan` explains the arguments.

    Args:
        inputs: positional arguments of its forward. Of tensors, only shapes and dtypes matter.
        optimizer: its name, or how many tensors of a weight's size it holds.
    """
    _check(optimizer, ranks, sharding, grad_accum)
    states = optimizer if isinstance(optimizer, int) else OPTIMIZERS[optimizer]
    run = _Run(states, ranks, ranks > 1 and sharding == "fsdp", grad_accum > 1)
    predictor = _Predictor(model, inputs, dtype, run, progress or (lambda _: None))
    base = predictor.predict("store")
    rows = tuple(base if mode == "store" else predictor.predict(str(mode), base) for mode in modes)
    limit, chosen = None, None
    if isinstance(budget, Memory):
        limit = predictor.predict(budget, base).peak
        chosen = _choose(predictor, base, limit, spare=0.0)  # one prediction against another: both err alike
    elif budget is not None:
        limit, chosen = budget, _choose(predictor, base, budget)
    return Plan(predictor.shape, str(dtype).removeprefix("torch."), ranks, sharding, rows, limit, chosen)


class _Run(NamedTuple):
    """What a process does and holds besides the model's own step."""

    states: int  # tensors of a weight's size that its optimizer holds
    ranks: int
    sharded: bool
    accumulates: bool  # are gradients of an earlier forward there when a step begins?


class _Predictor:
    """Simulates steps of one model, each under a memory policy of its own."""

    def __init__(self, model, inputs, dtype, run: _Run, progress):
        self.model, self.inputs, self.dtype, self.run, self.progress = model, inputs, dtype, run, progress
        self.columns = find_columns(model)
        self.shape = next((tuple(value.shape) for value in inputs if isinstance(value, Tensor)), ())
        self.simulated: dict[tuple[Any, ...], Footprint] = {}  # by memory policy: some are asked for several times

    def predict(
        self,
        mode: str,
        base: Prediction | None = None,
        stored: Collection[int] = (),
        recomputed: Collection[int] = (),
    ) -> Prediction:
        ways = {"mode": mode, "stored": tuple(sorted(stored)), "recomputed": tuple(sorted(recomputed))}
        policy = tuple(ways.values())
        if policy not in self.simulated:
            self.progress(_name(mode, stored, recomputed))
            self.simulated[policy] = self.simulate(mode, stored, recomputed)
        found = self.simulated[policy]
        flops = base.flops if base else found.flops
        return self._of_one_rank(found, ways, found.flops / max(flops, 1))

    def simulate(self, mode: str, stored: Collection[int], recomputed: Collection[int]) -> Footprint:
        modes = _memory(mode, recomputed, self.columns.column_count)
        try:
            with self.columns.using(modes=modes, stored=stored):
                return simulate(self.model, self.inputs, self.dtype, not self.run.sharded, self.run.accumulates)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise PlanError(
                f"an input of {self.shape} does not go through the net ({reason})", "input_shape", code="input-rejected"
            ) from error

    def costs(self) -> dict[int, Cost]:
        """What it takes to store each cell.

        Gradients give no room where they are there all along, or gone as soon as they are whole (of sharded weights).
        """
        self.progress("costs of the cells")
        costs = costs_of_cells(self.model, self.inputs, self.dtype)
        if not (self.run.sharded or self.run.accumulates):
            return costs
        return {index: replace(cost, gradients=0) for index, cost in costs.items()}

    def rebuilt_columns(self, cells: Iterable[int]) -> list[int]:
        """The columns of these cells, in their order, except for the first of each sequence: none is before it."""
        columns = self.columns.column_of_cell
        in_order = dict.fromkeys(columns[cell] for cell in cells)
        return [column for column in in_order if column not in self.columns.first_columns]

    def _of_one_rank(self, found: Footprint, ways: dict[str, Any], extra: float) -> Prediction:
        """Add to a single process's footprint what the optimizer and the other ranks bring."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained)
        optimizer = self.run.states * gradients
        activations = found.peak - found.parameters  # gradients among them, unless sharded
        if self.run.sharded:
            # Each rank holds a share of everything; of two cells at a time (the one that runs and the next, fetched
            # ahead) the whole weights, and of one the whole gradients, which `found` has counted.
            parameters, gradients, optimizer = (
                -(-count // self.run.ranks) for count in (found.parameters, gradients, optimizer)
            )
            cells = sorted(sum(p.nbytes for p in cell.parameters()) for cell in self.columns.flat())
            buckets = sum(cells[-2:])
            peak = parameters + gradients + optimizer + buckets + activations
        else:
            parameters = found.parameters
            buckets = gradients if self.run.ranks > 1 else 0
            peak = parameters + optimizer + buckets + activations
        return Prediction(
            **ways,
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            buckets=buckets,
            kept=found.kept,
            peak=peak,
            flops=found.flops,
            extra=extra,
        )


SPARE = 0.01
"""Lost bits are predicted from what is usual, so this part of the peak is left free for the unusual."""


def _choose(predictor: _Predictor, base: Prediction, budget: int, spare: float = SPARE) -> Prediction:
    """The least work under the budget: as many stored cells as fit, then the states of as many columns."""

    def fits(prediction: Prediction) -> bool:
        return (1 + spare) * prediction.peak <= budget

    if base.peak <= budget:
        return base
    least, batch = predictor.predict("exact", base), next(iter(predictor.shape), 1)
    if not fits(least):
        static = least.parameters + least.gradients + least.optimizer + least.buckets
        sample = max(least.peak - static, 0) // max(batch, 1)
        turn = (
            f"the weights, gradients and optimizer alone take {size(static)}; shard them over more ranks, or take "
            "an optimizer with less state"
            if static > budget
            else f"each of the {batch} samples takes about {size(sample)}; lower the batch, use bfloat16, or shard"
        )
        smallest = size(int((1 + spare) * least.peak))
        raise PlanError(
            f"nothing fits {size(budget)}: the smallest peak is {smallest}. Of it, {turn}", "budget", code="over-budget"
        )
    costs = predictor.costs()
    indices = list(costs)
    cells = [indices[place] for place in order(list(costs.values()))]
    best = _most(len(cells) - 1, least, fits, lambda n: predictor.predict("exact", base, cells[:n]))
    stored, columns = best.stored, predictor.rebuilt_columns(costs)
    return _most(len(columns), best, fits, lambda n: predictor.predict("exact", base, stored, columns[-n:]))


def _most(
    high: int, best: Prediction, fits: Callable[[Prediction], bool], attempt: Callable[[int], Prediction]
) -> Prediction:
    """The attempt with the greatest number, at most `high`, that fits; without any, `best`. By bisection."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        tried = attempt(middle)
        if fits(tried):
            best, low = tried, middle
        else:
            high = middle - 1
    return best


def _check(optimizer: str | int, ranks: int, sharding: str, grad_accum: int) -> None:
    if isinstance(optimizer, str) and optimizer not in OPTIMIZERS:
        raise PlanError(
            f"optimizer {optimizer!r} is unknown; choose {', '.join(OPTIMIZERS)}", "optimizer", code="unknown-choice"
        )
    if sharding not in SHARDINGS:
        raise PlanError(
            f"sharding {sharding!r} is unknown; choose {', '.join(SHARDINGS)}", "sharding", code="unknown-choice"
        )
    if ranks < 1:
        raise PlanError(f"ranks {ranks}: at least one process trains", "ranks", code="out-of-range")
    if grad_accum < 1:
        raise PlanError(
            f"grad_accum {grad_accum}: an update takes at least one forward pass", "grad_accum", code="out-of-range"
        )
