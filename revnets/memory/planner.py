"""Predicts what a training step of a module takes, and chooses what each cell keeps under a memory budget.

A cell keeps the lost bits of the state that it replaces, or that state, or also the last of the tensors that it saves,
or all of them (`ReversibleColumns.kept`, `.stored`): the more it keeps, the less it replays. What each of these costs
is read from simulated steps (`step_record.py`, `cell_options.py`); the best choice is searched for
(`policy_search.py`) and simulated as well, because tensors that cells share count once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnets.config.memory_budget import OPTIMIZERS, SHARDINGS
from revnets.engine.columns_group import find_columns
from revnets.engine.memory_mode import Memory
from revnets.memory.cell_options import CellPolicy, PolicySpace
from revnets.memory.policy_search import search
from revnets.memory.saved_tensors import CellCost, costs_of_cells
from revnets.memory.simulation import Footprint, simulate
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
    kept_cells: tuple[tuple[int, int | None], ...]  # further cells that keep theirs, as in `ReversibleColumns.kept`
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
        return self.policy.name

    @property
    def policy(self) -> CellPolicy:
        """What the cells keep."""
        return CellPolicy(self.mode, self.stored, self.recomputed, self.kept_cells)

    def memory(self, columns: int) -> list[str]:
        """The memory mode of each column."""
        return self.policy.memory(columns)


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
        self.chosen.policy.apply(find_columns(model))

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
        chosen = _choose(predictor, base, limit, exactly=True)  # one prediction against another: both err alike
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
        self.simulated: dict[CellPolicy, Footprint] = {}  # some are asked for several times
        self.costs: dict[int, CellCost] = {}

    def predict(self, policy: str | CellPolicy, base: Prediction | None = None) -> Prediction:
        """What a step takes in a memory mode, or under any policy."""
        policy = policy if isinstance(policy, CellPolicy) else CellPolicy(policy)
        found = self.footprint(policy)
        flops = base.flops if base else found.flops
        return self._of_one_rank(found, policy, found.flops / max(flops, 1))

    def footprint(self, policy: CellPolicy) -> Footprint:
        if policy not in self.simulated:
            self.progress(policy.name)
            self.simulated[policy] = self._simulate(policy)
        return self.simulated[policy]

    def _simulate(self, policy: CellPolicy) -> Footprint:
        try:
            with self.columns.using():
                policy.apply(self.columns)
                return simulate(self.model, self.inputs, self.dtype, not self.run.sharded, self.run.accumulates)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise PlanError(
                f"an input of {self.shape} does not go through the net ({reason})", "input_shape", code="input-rejected"
            ) from error

    def search(self, peak: int, corrections: Sequence[int] = ()) -> tuple[CellPolicy, list[int]] | None:
        """The policy with the least work whose peak is at most this, as far as single cells tell.

        Args:
            corrections: bytes to add to the peak around each cell, and to that behind all of them.

        Returns:
            The policy, and the bytes by which the peak around each cell differs from that in its simulated step.
        """
        static = self.predict("exact").peak - self.footprint(CellPolicy("exact")).peak
        if not self.costs:
            self.progress("what cells save")
            self.costs = costs_of_cells(self.model, self.inputs, self.dtype)
        uses = {mode: self.footprint(CellPolicy(mode)).cells for mode in ("store", "recompute", "exact")}
        space = PolicySpace(uses, self.costs, self.columns, peak - static, corrections)
        found = search(space.options, space.room)
        if found is None:
            return None
        policy = space.policy(found)
        peaks = self.footprint(policy).cells.peaks
        return policy, [real - expected for real, expected in zip(peaks, space.peaks(found), strict=True)]

    def margin(self, prediction: Prediction) -> int:
        """Bytes to leave free: lost bits are predicted from what is usual, a hundredth of the peak if all cells have
        them, and a fifth of that for the rest of the prediction."""
        states, exact = (self.footprint(CellPolicy(mode)).cells for mode in ("recompute", "exact"))
        spared = {index: kept - lost for index, kept, lost in zip(exact.indices, states.kept, exact.kept, strict=True)}
        columns, more = self.columns.column_of_cell, {*prediction.stored, *dict(prediction.kept_cells)}
        lossy = [index for index in spared if index not in more and columns[index] not in prediction.recomputed]
        share = sum(spared[index] for index in lossy) / max(sum(spared.values()), 1)
        return int((0.002 + 0.008 * share) * prediction.peak)

    def work(self, prediction: Prediction) -> int:
        """Of a step that was simulated, in units of `OpCounter.work`."""
        return self.simulated[prediction.policy].work

    def _of_one_rank(self, found: Footprint, policy: CellPolicy, extra: float) -> Prediction:
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
            mode=policy.mode,
            stored=policy.stored,
            recomputed=policy.recomputed,
            kept_cells=policy.kept_cells,
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            buckets=buckets,
            kept=found.kept,
            peak=peak,
            flops=found.flops,
            extra=extra,
        )


def _choose(predictor: _Predictor, base: Prediction, budget: int, exactly: bool = False) -> Prediction:
    """The least work under the budget, with a margin for what predictions miss unless it is to be met exactly."""

    def needs(prediction: Prediction) -> int:
        return prediction.peak + (0 if exactly else predictor.margin(prediction))

    if base.peak <= budget:
        return base
    least, batch = predictor.predict("exact", base), next(iter(predictor.shape), 1)
    if needs(least) > budget:
        static = least.parameters + least.gradients + least.optimizer + least.buckets
        sample = max(least.peak - static, 0) // max(batch, 1)
        turn = (
            f"the weights, gradients and optimizer alone take {size(static)}; shard them over more ranks, or take "
            "an optimizer with less state"
            if static > budget
            else f"each of the {batch} samples takes about {size(sample)}; lower the batch, use bfloat16, or shard"
        )
        smallest = size(needs(least))
        raise PlanError(
            f"nothing fits {size(budget)}: the smallest peak is {smallest}. Of it, {turn}", "budget", code="over-budget"
        )
    best, tried = least, least
    corrections: list[int] = []
    for _ in range(ATTEMPTS):
        found = predictor.search(budget - needs(tried) + tried.peak, corrections)
        if found is None:
            break
        policy, errors = found
        is_known, tried = policy == tried.policy, predictor.predict(policy, base)
        if needs(tried) <= budget:
            best = min(best, tried, key=predictor.work)
        if is_known or 0 <= budget - needs(tried) < CLOSE * budget:
            break
        # Tensors that cells share, and what else single cells do not tell, set the peaks off.
        found = [known + error for known, error in zip(corrections or [0] * len(errors), errors, strict=True)]
        corrections = [max(pair) for pair in zip(corrections, found, strict=True)] if corrections else found
    return best


ATTEMPTS, CLOSE = 6, 0.002
"""Policies that are simulated at most, and the part of a budget that may be left without trying another one."""


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
