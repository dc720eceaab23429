"""Is it reversible, is the gradient right, what is kept: measured on the model at hand, not promised.

Every number comes from the model's own forward and the engine's own tape, in the surrounding that the model runs in:
dropout, BatchNorm, autocast and padding masks take part. `revnets/analysis/audit_report.py` says what the numbers mean.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnets.analysis.audit_report import Audit, ModeAudit
from revnets.analysis.column_bytes import bytes_by_column
from revnets.analysis.gradient_distance import GradientDistance, gradient_distance, norm, same_bits
from revnets.analysis.reconstruction import reconstruction
from revnets.engine.columns_group import ColumnsGroup, find_columns
from revnets.engine.drift import DriftWarning
from revnets.engine.errors import ArgumentError, ReplayError
from revnets.engine.memory_mode import Memory
from revnets.engine.replay.replay_context import outside_of_autocast
from revnets.memory.tracker import MemoryTracker, OpCounter, tensors

MODES = tuple(str(mode) for mode in Memory)

ROUNDS = 3
"""Steps of each mode that are timed."""


def audit(
    model: nn.Module,
    x: Any,
    *,
    modes: Sequence[str] = MODES,
    loss: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Audit:
    """Measure reconstruction, gradients and memory of a model with reversible columns.

    Everything is left as it was: parameters, `.grad`, buffers, generators, memory policy. The pass runs under the
    training flags and the autocast it finds: call `train()` or `eval()` before. Gradients are taken with
    `torch.autograd.grad`, so hooks that wait for `.grad` do not fire.

    Args:
        model: has reversible columns, see `revnets.find_columns`.
        x: the model's input; a tuple is passed on as positional, a mapping as keyword arguments.
        modes: memory modes to measure. `store` runs in any case: it is what the others are held against.
        loss: from the model's output to a scalar. By default a fixed random projection of all outputs, so that every
            level gets a gradient.
        seed: of the random numbers inside of the model (dropout) and of the projection.
        progress: is told what is measured next.

    Raises:
        ArgumentError: no reversible columns; an unknown mode; nothing that could get a gradient.
    """
    columns = find_columns(model)
    modes = (modes,) if isinstance(modes, str) else modes
    for mode in modes:
        if mode not in MODES:
            raise ArgumentError(
                f"memory mode {mode!r} is unknown; choose {', '.join(MODES)}", "modes", code="unknown-choice"
            )
    leaves = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    leaves |= {f"input {index}": tensor for index, tensor in enumerate(tensors(x)) if tensor.requires_grad}
    if not leaves:
        raise ArgumentError(
            "no parameter and no input requires a gradient, so there is none to compare", "model", code="no-gradient"
        )
    tell = progress or (lambda _: None)

    with _left_as_found(model, columns) as restore, outside_of_autocast() as region, warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # it is measured here

        def forward() -> Any:
            with region():
                return _call(model, x)

        def losses(output: Any) -> list[Tensor]:
            with region():
                return _roots(output, loss)

        step = partial(_step, columns, forward, losses, leaves, seed, restore)
        tell("store")
        reference = step(Memory.STORE).gradients  # caches that the model fills once are filled here, and not counted
        _require_finite(reference)
        tell("store, once more")
        again = step(Memory.STORE)
        results = []
        for mode in modes:
            if mode != Memory.STORE:
                tell(mode)
            measured = again if mode == Memory.STORE else step(Memory(mode))
            results.append(_mode_audit(mode, measured, reference, columns.first_columns))
        noise = gradient_distance(again.gradients, reference).relative
        tell("time")
        seconds = _times(columns, forward, losses, leaves, seed, restore, results)
        results = [replace(mode, seconds=seconds.get(mode.mode, math.nan)) for mode in results]
        tell("reconstruction")
        rebuilt = [
            replace(column, column=first + column.column)
            for member, first in zip(columns, columns.first_columns, strict=True)
            for column in reconstruction(member, forward, seed)
        ]
    levels = max(member.graph.m for member in columns)
    return Audit(type(model).__name__, levels, tuple(rebuilt), tuple(results), noise)


Gradients = dict[str, Tensor | None]


class _Measured(NamedTuple):
    """One forward and backward."""

    gradients: Gradients
    kept: int
    peak: int
    column_bytes: dict[int, int]
    forward: OpCounter
    backward: OpCounter
    failure: str


def _step(columns, forward, losses, leaves, seed, restore, mode: Memory) -> _Measured:
    restore()
    columns.memory = mode
    torch.manual_seed(seed)
    tracker, going, coming = MemoryTracker(), OpCounter(), OpCounter()
    gradients: Gradients = {}
    added: dict[int, int] = {}
    kept, failure = 0, ""
    try:
        with tracker, going, bytes_by_column(columns, tracker) as added:
            output = forward()
        kept = tracker.live
        with tracker, going:
            roots = losses(output)
        weights = _projection(roots, seed)
        del output
        with tracker, coming:
            found = torch.autograd.grad(roots, list(leaves.values()), weights, allow_unused=True)
        gradients = dict(zip(leaves, found, strict=True))
    except ReplayError as error:
        failure = str(error)
    return _Measured(gradients, kept, tracker.peak, added, going, coming, failure)


def _times(columns, forward, losses, leaves, seed, restore, modes: Sequence[ModeAudit]) -> dict[str, float]:
    """Median seconds of a step in each mode that does not fail, without any counter around it.

    CPU seconds of this process, which other jobs on the machine hardly change; elapsed ones on an accelerator. The
    modes take turns, so that a machine that slows down slows all of them.
    """
    on_cpu = all(leaf.device.type == "cpu" for leaf in leaves.values())
    found: dict[str, list[float]] = {mode.mode: [] for mode in modes if not mode.failure}
    for _ in range(ROUNDS):
        for mode, seconds in found.items():
            restore()
            columns.memory = mode
            torch.manual_seed(seed)
            begin = _clock(on_cpu)
            with suppress(ReplayError):  # of a cell that is not the same each time; the gradients have told
                roots = losses(forward())
                torch.autograd.grad(roots, list(leaves.values()), _projection(roots, seed), allow_unused=True)
                seconds.append(_clock(on_cpu) - begin)
    return {mode: median(seconds) for mode, seconds in found.items() if seconds}


def _clock(on_cpu: bool) -> float:
    if on_cpu:
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def _mode_audit(mode: str, measured: _Measured, reference: Gradients, first_columns: Sequence[int]) -> ModeAudit:
    if measured.failure:
        apart = GradientDistance(math.nan, "", math.nan, False)
    else:
        apart = gradient_distance(measured.gradients, reference)
    return ModeAudit(
        mode=str(mode),
        gradient_error=apart.relative,
        worst_parameter=apart.worst,
        worst_error=apart.worst_relative,
        equal=apart.equal,
        kept_bytes=measured.kept,
        peak_bytes=measured.peak,
        column_bytes=tuple(measured.column_bytes.values()),
        first_columns=tuple(i for i, column in enumerate(measured.column_bytes) if column in first_columns),
        forward_matmuls=measured.forward.matmuls,
        backward_matmuls=measured.backward.matmuls,
        forward_flops=measured.forward.flops,
        backward_flops=measured.backward.flops,
        failure=measured.failure,
    )


def _require_finite(gradients: Gradients) -> None:
    for name, gradient in gradients.items():
        if gradient is not None and not math.isfinite(
            norm(gradient.coalesce().values() if gradient.is_sparse else gradient)
        ):
            raise ArgumentError(
                f"the gradient of {name} is not finite with ordinary autograd either (memory mode store), so nothing "
                "can be held against it; check the input and the loss",
                "model",
                code="not-finite",
            )


def _call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _roots(output: Any, loss: Callable[[Any], Tensor] | None) -> list[Tensor]:
    """Where backward starts."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            text = "loss must turn the model's output into one number that requires a gradient"
            raise ArgumentError(text, "loss", code="invalid-value")
        return [value]
    roots = [tensor for tensor in tensors(output) if tensor.requires_grad]
    if not roots:
        raise ArgumentError(
            "no output of the model requires a gradient; is all of it frozen, or detached?", "model", code="no-gradient"
        )
    return roots


def _projection(roots: list[Tensor], seed: int) -> list[Tensor | None]:
    """Random weights w_i: backward from them is that of the loss sum_i <w_i, output_i>, without its memory.

    A single number, such as a loss, has weight 1, which autograd writes as None.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        None if root.numel() == 1 else torch.randn(root.shape, generator=generator).to(root.device, root.dtype)
        for root in roots
    ]


@contextmanager
def _left_as_found(model: nn.Module, columns: ColumnsGroup) -> Iterator[Callable[[], None]]:
    """Put buffers, generators and the memory policy back at the end; yields what puts the buffers back in between."""
    found = [
        (module._buffers, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]

    def restore() -> None:
        for buffers, name, buffer, value in found:
            buffers[name] = buffer
            if buffer is not None and value is not None and not same_bits(buffer, value):
                with torch.no_grad():
                    buffer.copy_(value)

    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator else "cuda"
    generators = torch.random.fork_rng(range(torch.accelerator.device_count()), device_type=kind)
    with generators, columns.using(stored=0):  # a plan in force would be part of every mode
        try:
            yield restore
        finally:
            restore()
