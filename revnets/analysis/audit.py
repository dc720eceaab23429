"""Audit of a model: measure whether it is reversible, whether its gradients are right, and what it saves for backward.

Every number comes from the forward pass of the model and the tape of the engine, with dropout, BatchNorm, autocast and
padding masks as in training. `revnets/analysis/audit_report.py` explains the numbers.
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
"""Number of timed steps per mode."""


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

    Parameters, `.grad`, buffers, random number generators and the memory policy are unchanged afterwards. The steps
    run with the current training flags and autocast state, so call `train()` or `eval()` first. Gradients are computed
    by `torch.autograd.grad`, which does not trigger hooks on `.grad`.

    Example:
        ```python
        net = revnets.ReversibleSequence([nn.Linear(4, 4) for _ in range(4)])
        assert revnets.audit(net, torch.randn(2, 4)).ok
        ```

    Args:
        model: Module with reversible columns, see `revnets.find_columns`.
        x: Input of the model. A tuple contains positional arguments, a mapping keyword arguments.
        modes: Memory modes to measure. `store` always runs as the reference.
        loss: Function from the output of the model to a scalar. The default is a fixed random projection of all
            outputs, so that every level gets a gradient.
        seed: Seed of the random numbers in the model (dropout) and of the projection.
        progress: Called with the name of each measurement before it starts.

    Returns:
        The audit.

    Raises:
        ArgumentError: If there are no reversible columns, a mode is unknown, or nothing requires a gradient.
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
            "no parameter and no input requires a gradient, so there is nothing to compare",
            "model",
            code="no-gradient",
        )
    tell = progress or (lambda _: None)

    with _left_as_found(model, columns) as restore, outside_of_autocast() as region, warnings.catch_warnings():
        warnings.simplefilter("ignore", DriftWarning)  # the audit measures the drift

        def forward() -> Any:
            with region():
                return _call(model, x)

        def losses(output: Any) -> list[Tensor]:
            with region():
                return _roots(output, loss)

        step = partial(_step, columns, forward, losses, leaves, seed, restore)
        tell("store")
        reference = step(Memory.STORE).gradients  # the model fills its caches in this step, which is not counted
        _require_finite(reference)
        tell("store, second run")
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
    """Measurements of one forward and backward pass."""

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
    """Return the median seconds of a step without counters, for each mode that does not fail.

    On the CPU, this is CPU time of the process, which other jobs on the machine hardly affect. On an accelerator, it
    is elapsed time. The modes take turns, so that a slowdown of the machine affects all of them.
    """
    on_cpu = all(leaf.device.type == "cpu" for leaf in leaves.values())
    found: dict[str, list[float]] = {mode.mode: [] for mode in modes if not mode.failure}
    for _ in range(ROUNDS):
        for mode, seconds in found.items():
            restore()
            columns.memory = mode
            torch.manual_seed(seed)
            begin = _clock(on_cpu)
            with suppress(ReplayError):  # a non-deterministic cell, which the gradient step has already reported
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
                f"the gradient of {name} is not finite even with ordinary autograd (memory mode store), so there is "
                "no reference; check the input and the loss",
                "model",
                code="not-finite",
            )


def _call(model: nn.Module, x: Any) -> Any:
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _roots(output: Any, loss: Callable[[Any], Tensor] | None) -> list[Tensor]:
    """Return the tensors from which backward starts."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            text = "loss must return a tensor with one element that requires a gradient"
            raise ArgumentError(text, "loss", code="invalid-value")
        return [value]
    roots = [tensor for tensor in tensors(output) if tensor.requires_grad]
    if not roots:
        raise ArgumentError(
            "no output of the model requires a gradient; check for frozen parameters and detached outputs",
            "model",
            code="no-gradient",
        )
    return roots


def _projection(roots: list[Tensor], seed: int) -> list[Tensor | None]:
    """Return random weights w_i as output gradients: those of the loss sum_i <w_i, output_i>, without its memory.

    A scalar output, such as a loss, has weight 1, which is None in autograd.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        None if root.numel() == 1 else torch.randn(root.shape, generator=generator).to(root.device, root.dtype)
        for root in roots
    ]


@contextmanager
def _left_as_found(model: nn.Module, columns: ColumnsGroup) -> Iterator[Callable[[], None]]:
    """Restore buffers, generators and the memory policy at the end. Yields a function that restores the buffers."""
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
    with generators, columns.using(stored=0):  # without the current memory plan
        try:
            yield restore
        finally:
            restore()
