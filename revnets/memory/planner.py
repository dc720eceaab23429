"""Memory planner: predict the memory of a training step, and choose what each cell saves under a memory budget.

A cell saves the lost bits of the state that it replaces, or that state, or in addition the last of its saved tensors,
or all of them (`ReversibleColumns.kept`, `.stored`). The more it saves, the less it recomputes. The costs come from
simulated steps (`step_record.py`, `cell_options.py`). The search for the best choice is in `policy_search.py`. Its
result is simulated again, because a tensor that several cells share counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnets.config.memory_budget import OPTIMIZERS, SHARDINGS, HostMemory
from revnets.engine.columns_group import find_columns
from revnets.engine.memory_mode import Memory
from revnets.memory.cell_options import CellPolicy, PolicySpace
from revnets.memory.host_options import HostOptions, least_kept
from revnets.memory.policy_search import Option, search
from revnets.memory.predictions import Plan as Plan
from revnets.memory.predictions import PlanError as PlanError
from revnets.memory.predictions import Prediction as Prediction
from revnets.memory.saved_tensors import CellCost, costs_of_cells
from revnets.memory.simulation import Footprint, simulate
from revnets.utils.format import size


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
    host: HostMemory | None = None,
    modes: Sequence[str] = tuple(Memory),
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Plan the memory of a training step of a module.

    Args:
        model: Module with reversible columns.
        inputs: Positional arguments of its forward pass. Only shapes and dtypes of tensors matter.
        dtype: float32, or bfloat16 or float16 for autocast.
        optimizer: Name of the optimizer, or the number of tensors of a weight's size in its state.
        ranks: Number of processes that train together.
        sharding: `ddp` or `fsdp`.
        grad_accum: Forward passes per update.
        budget: Bytes, or a memory mode, whose peak is the budget.
        host: Host memory that cells may use in addition. Requires a budget.
        modes: Memory modes to predict.
        progress: Called with the name of each policy before it is simulated.

    Raises:
        PlanError: If an argument is invalid, or nothing fits the budget.
    """
    _check(optimizer, ranks, sharding, grad_accum)
    if host is not None and budget is None:
        text = "host memory requires a budget for the device; pass one, such as budget='24GiB'"
        raise PlanError(text, "host", code="missing-budget")
    states = optimizer if isinstance(optimizer, int) else OPTIMIZERS[optimizer]
    run = _Run(states, ranks, ranks > 1 and sharding == "fsdp", grad_accum > 1)
    predictor = _Predictor(model, inputs, dtype, run, progress or (lambda _: None))
    hosted = host and HostOptions(host, model, dtype)
    base = predictor.predict("store")
    rows = tuple(base if mode == "store" else predictor.predict(str(mode), base) for mode in modes)
    limit, chosen = None, None
    if isinstance(budget, Memory):
        limit = predictor.predict(budget, base).peak
        chosen = _choose(predictor, base, limit, hosted, exactly=True)  # both peaks have the same prediction error
    elif budget is not None:
        limit, chosen = budget, _choose(predictor, base, budget, hosted)
    name = str(dtype).removeprefix("torch.")
    return Plan(predictor.shape, name, ranks, sharding, rows, limit, chosen, host.bytes if host else None)


class _Run(NamedTuple):
    """Settings of the training run that the memory of a process depends on."""

    states: int  # tensors of a weight's size in the optimizer state
    ranks: int
    sharded: bool
    accumulates: bool  # whether gradients of an earlier forward pass exist when a step begins


class _Predictor:
    """Simulates training steps of one model under different memory policies."""

    def __init__(self, model, inputs, dtype, run: _Run, progress):
        self.model, self.inputs, self.dtype, self.run, self.progress = model, inputs, dtype, run, progress
        self.columns = find_columns(model)
        self.shape = next((tuple(value.shape) for value in inputs if isinstance(value, Tensor)), ())
        self.simulated: dict[CellPolicy, Footprint] = {}  # a policy may be requested several times
        self.costs: dict[int, CellCost] = {}
        self.waits: dict[CellPolicy, int] = {}  # waits for the link to the host, in units of `OpCounter.work`

    def predict(self, policy: str | CellPolicy, base: Prediction | None = None) -> Prediction:
        """Predict the memory of a step in a memory mode or under a policy."""
        policy = policy if isinstance(policy, CellPolicy) else CellPolicy(policy)
        found = self.footprint(policy)
        flops = base.flops if base else found.flops
        waits = self.waits.get(policy, 0)
        lost = waits / max(self.footprint(CellPolicy("store")).work, 1) if waits else 0.0
        return self._of_one_rank(found, policy, found.flops / max(flops, 1) + lost)

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
                f"the model rejects an input of shape {self.shape} ({reason})", "input_shape", code="input-rejected"
            ) from error

    def space(self, peak: int, corrections: Sequence[int] = (), host: HostOptions | None = None) -> PolicySpace:
        """Return what cells may keep in a step with this peak.

        Args:
            peak: Largest allowed peak of a process.
            corrections: Bytes to add to the expected peak around each cell, and after the last cell.
            host: Options for host memory, or None.
        """
        static = self.predict("exact").peak - self.footprint(CellPolicy("exact")).peak
        if not self.costs:
            self.progress("what cells save")
            self.costs = costs_of_cells(self.model, self.inputs, self.dtype)
        uses = {mode: self.footprint(CellPolicy(mode)).cells for mode in ("store", "recompute", "exact")}
        space = PolicySpace(uses, self.costs, self.columns, peak - static, corrections)
        if host is not None:
            forward = [cost.work for cost in self.costs.values()]
            backward = [both - one for both, one in zip(uses["store"].work, forward, strict=True)]
            # Backward allocates gradients while it frees what the cell kept, unless sharding removes them at once or
            # they exist already.
            stays = not self.run.sharded and not self.run.accumulates
            gradients = [cost.gradients if stays else 0 for cost in self.costs.values()]
            space.options = host.extended(space.options, forward, backward, gradients)
        return space

    def search(
        self, peak: int, corrections: Sequence[int] = (), host: HostOptions | None = None
    ) -> tuple[CellPolicy, list[int]] | None:
        """Find the policy with the least compute whose expected peak is at most `peak`.

        The expectation adds up single cells. It misses what they share.

        Returns:
            The policy, and per cell the simulated peak minus the expected one. None if nothing fits.
        """
        space = self.space(peak, corrections, host)
        found = search(space.options, space.room) if host is None else host.search(space.options, space.room)
        return None if found is None else self._with_errors(space, found)

    def _with_errors(self, space: PolicySpace, choice: Sequence[Option]) -> tuple[CellPolicy, list[int]]:
        policy = self._policy(space, choice)
        peaks = self.footprint(policy).cells.peaks
        return policy, [real - expected for real, expected in zip(peaks, space.peaks(choice), strict=True)]

    def least(self, host: HostOptions | None) -> list[CellPolicy]:
        """Return the policies that may have the lowest peak."""
        exact = CellPolicy("exact")
        if host is None:
            return [exact]
        space = self.space(0, host=host)
        return [exact, self._policy(space, least_kept(space.options))]

    def least_errors(self, host: HostOptions) -> list[int]:
        """Return the errors of the expected peaks, as `search` does, for the policy that keeps least on the device."""
        space = self.space(0, host=host)
        return self._with_errors(space, least_kept(space.options))[1]

    def _policy(self, space: PolicySpace, choice: Sequence[Option]) -> CellPolicy:
        policy = space.policy(choice)
        self.waits[policy] = sum(option.waits for option in choice)
        return policy

    def margin(self, prediction: Prediction) -> int:
        """Return the bytes to leave free below a budget.

        The length of lost bits is an estimate: 0.8 % of the peak if all cells keep them. 0.2 % is for everything else.
        """
        states, exact = (self.footprint(CellPolicy(mode)).cells for mode in ("recompute", "exact"))
        spared = {index: kept - lost for index, kept, lost in zip(exact.indices, states.kept, exact.kept, strict=True)}
        columns, more = self.columns.column_of_cell, {*prediction.stored, *dict(prediction.kept_cells)}
        lossy = [index for index in spared if index not in more and columns[index] not in prediction.recomputed]
        share = sum(spared[index] for index in lossy) / max(sum(spared.values()), 1)
        return int((0.002 + 0.008 * share) * prediction.peak)

    def work(self, prediction: Prediction) -> int:
        """Return the compute cost of a simulated step, in units of `OpCounter.work`."""
        return self.simulated[prediction.policy].work + self.waits.get(prediction.policy, 0)

    def _of_one_rank(self, found: Footprint, policy: CellPolicy, extra: float) -> Prediction:
        """Add optimizer state and communication buffers to the footprint of a single process."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        gradients = sum(parameter.nbytes for parameter in trained)
        optimizer = self.run.states * gradients
        activations = found.peak - found.parameters  # includes gradients unless they are sharded
        if self.run.sharded:
            # Each rank holds a shard of everything. It also holds the full weights of two cells (the running one and
            # the prefetched next one), and the full gradients of one cell, which `found` includes.
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
            offloaded=policy.offloaded,
            host=found.host,
            products=policy.products,
        )


def _choose(
    predictor: _Predictor, base: Prediction, budget: int, host: HostOptions | None, exactly: bool = False
) -> Prediction:
    """Return the prediction with the least compute under the budget, with or without host memory."""
    if base.peak <= budget:
        return base
    found: list[Prediction] = []
    for ways in dict.fromkeys((None, host)):
        try:
            found.append(_least_work(predictor, base, budget, ways, exactly))
        except PlanError:
            if ways is host and not found:
                raise
    return min(found, key=predictor.work)


def _least_work(
    predictor: _Predictor, base: Prediction, budget: int, host: HostOptions | None, exactly: bool
) -> Prediction:
    """Return the prediction with the least compute under the budget, with a margin for errors unless `exactly`."""

    def needs(prediction: Prediction) -> int:
        return prediction.peak + (0 if exactly else predictor.margin(prediction))

    def fits(prediction: Prediction) -> bool:
        return needs(prediction) <= budget and (host is None or prediction.host <= host.host.bytes)

    lowest = [predictor.predict(policy, base) for policy in predictor.least(host)]
    least = min(lowest, key=needs)  # host memory may be too small for all of it, but a part may be enough
    if needs(least) > budget:
        raise _over_budget(predictor, least, needs(least), budget)
    found = lowest
    # Cells share states, so the expected use of host memory is far off. Two starting points find better policies.
    for corrections in [predictor.least_errors(host), []] if host else [[]]:
        found = [*found, *_attempts(predictor, base, budget, host, least, needs, corrections)]
        if any(fits(prediction) and prediction.extra <= 1.0 for prediction in found):
            break
    best = min(filter(fits, found), key=predictor.work, default=None)
    if best is None:  # host memory is too small for what does not fit on the device
        raise _over_budget(predictor, lowest[0], needs(lowest[0]), budget)
    return best


def _attempts(
    predictor: _Predictor,
    base: Prediction,
    budget: int,
    host: HostOptions | None,
    tried: Prediction,
    needs: Callable[[Prediction], int],
    corrections: list[int],
) -> Iterator[Prediction]:
    """Yield policies one after the other, each corrected by the errors of the previous ones."""
    if host is not None:
        host.limit = host.host.bytes
    for _ in range(ATTEMPTS):
        found = predictor.search(budget - needs(tried) + tried.peak, corrections, host)
        if found is None:
            return
        policy, errors = found
        is_known, tried = policy == tried.policy, predictor.predict(policy, base)
        is_within = host is None or host.takes(tried.host)
        yield tried
        fits = is_within and needs(tried) <= budget
        if fits and (is_known or tried.extra <= 1.0 or budget - needs(tried) < CLOSE * budget):
            return
        if is_known and is_within:  # the search rounds every cell to units, so it can exceed the budget by a few
            spare = max(needs(tried) - budget, int(CLOSE * budget))
            corrections = [known + spare for known in corrections or [0] * len(errors)]
            continue
        # Correct the expected peaks by what cells share.
        found = [known + error for known, error in zip(corrections or [0] * len(errors), errors, strict=True)]
        corrections = [max(pair) for pair in zip(corrections, found, strict=True)] if corrections else found


def _over_budget(predictor: _Predictor, least: Prediction, needed: int, budget: int) -> PlanError:
    """Return the error for a budget that nothing fits: the smallest possible peak, and how to lower it."""
    batch = next(iter(predictor.shape), 1)
    static = least.parameters + least.gradients + least.optimizer + least.buckets
    sample = max(least.peak - static, 0) // max(batch, 1)
    turn = (
        f"weights, gradients and optimizer alone take {size(static)}; shard them over more ranks, or use an "
        "optimizer with less state"
        if static > budget
        else f"each of the {batch} samples takes about {size(sample)}; lower the batch size, use bfloat16, or shard"
    )
    text = f"nothing fits {size(budget)}: the smallest peak is {size(needed)}, of which {turn}"
    return PlanError(text, "budget", code="over-budget")


ATTEMPTS, CLOSE = 6, 0.002
"""Largest number of simulated policies, and the fraction of the budget that may stay unused without another attempt."""


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
        raise PlanError(f"ranks is {ranks}; pass at least 1", "ranks", code="out-of-range")
    if grad_accum < 1:
        raise PlanError(f"grad_accum is {grad_accum}; pass at least 1", "grad_accum", code="out-of-range")
