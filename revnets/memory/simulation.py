"""Simulation of one training step on fake tensors, with a count of its bytes and its compute.

Fake tensors have shapes but no memory, so the model may be far larger than the machine. The simulation includes
everything that happens in a real step: saved tensors of autograd, the tape of the engine, replays and gradients. Lost
bits are the exception: they depend on values, so their length is the expected one at the typical |gamma| of the model
(`lost_bits.expected_bytes`).
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from revnets.config.errors import ArgumentError
from revnets.engine import lost_bits
from revnets.engine.cell import Cell, FixedGain, Gain
from revnets.engine.columns_group import all_modules
from revnets.engine.torch_internals import storage_key
from revnets.memory.step_record import CellUses, StepRecord
from revnets.memory.tracker import MemoryTracker, OpCounter, tensors


@dataclass(frozen=True, slots=True)
class Footprint:
    """Memory and compute of one simulated training step.

    Attributes:
        parameters: Bytes of parameters and buffers.
        kept: Bytes that the forward pass leaves alive for backward.
        peak: Most bytes alive at once, including parameters, and gradients if they are kept.
        flops: Floating point operations of matrix products and convolutions, forward and backward.
        work: Compute cost: FLOPs and bytes written, see `OpCounter.work`.
        cells: Memory and compute by cell.
        host: Most bytes in host memory at once.
    """

    parameters: int
    kept: int
    peak: int
    flops: int
    work: int
    cells: CellUses
    host: int


def simulate(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype = torch.float32,
    keep_gradients: bool = True,
    accumulates: bool = False,
) -> Footprint:
    """Run forward and backward of a model on fake copies of the model and its inputs.

    Args:
        model: Any module, possibly on the meta device. Its memory modes are used as they are.
        inputs: Positional arguments of its forward pass. Only shapes and dtypes matter.
        dtype: float32, or bfloat16 or float16 for autocast.
        keep_gradients: If False, each gradient is dropped once it is complete, as in sharded training.
        accumulates: Whether gradients of an earlier batch exist and the new ones are added to them.

    Returns:
        Memory and compute of the step.

    Raises:
        ArgumentError: If no output of the model requires a gradient.
    """
    gamma = typical_gamma(model)
    with FakeTensorMode() as mode, lost_bits.assumed(gamma):
        model, inputs = fake((model, inputs), mode)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hooks = [] if keep_gradients else [weight.register_post_accumulate_grad_hook(_drop) for weight in trained]
        with without_packing((inputs, vars(model))), MemoryTracker() as tracker, OpCounter() as counter:
            tracker.register(model)
            parameters = tracker.live
            if accumulates and keep_gradients:
                for weight in trained:
                    weight.grad = torch.zeros_like(weight)
            begun = tracker.live
            record = StepRecord(model, tracker, counter)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = total(model(*inputs))
            kept = tracker.live - begun
            loss.backward()
            cells = record.end()
        for hook in hooks:
            hook.remove()
    return Footprint(parameters, kept, tracker.peak, counter.flops, counter.work, cells, tracker.host_peak)


@contextmanager
def without_packing(inputs: Any) -> Generator[None]:
    """Make transformers treat position ids that a model creates itself as those of one text per row.

    transformers inspects their values to find several texts packed into a row. Fake tensors have no values, so it
    would assume packed texts and build a mask over all pairs of positions that a real step does not have.

    Args:
        inputs: Nested tensors that the model receives. Position ids among them may be packed.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    if masks is None or not hasattr(masks, "find_packed_sequence_indices"):
        yield
        return
    with _lock:
        original = _running[0] if _running else masks.find_packed_sequence_indices
        if not _running:
            masks.find_packed_sequence_indices = _without_packing_here(original)
        _running.append(original)
    before, _thread.given = _thread.given, {storage_key(tensor) for tensor in tensors(inputs)}
    try:
        yield
    finally:
        _thread.given = before
        with _lock:
            _running.pop()
            if not _running:
                masks.find_packed_sequence_indices = original


def _without_packing_here(original: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
    """Wrap the function of transformers: in threads that simulate a step, it inspects only inputs of the model."""

    @wraps(original)
    def find(position_ids: Tensor) -> Tensor | None:
        is_made = _thread.given is not None and storage_key(position_ids) not in _thread.given
        return None if is_made else original(position_ids)

    return find


class _Thread(threading.local):
    given: set[Any] | None = None  # storages of the inputs of the simulated model


_thread, _lock = _Thread(), threading.Lock()
_running: list[Any] = []  # the original function, once per running simulation of any thread


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def total(outputs: Any) -> Tensor:
    """Return a scalar loss that depends on every differentiable output."""
    terms = [tensor.float().mean() for tensor in tensors(outputs) if tensor.requires_grad]
    if not terms:
        raise ArgumentError(
            "no output of the model requires a gradient, so there is no training step to simulate",
            "model",
            code="no-gradient",
        )
    return torch.stack(terms).sum()


def fake(value: Any, mode: FakeTensorMode) -> Any:
    """Return a deep copy with fake CPU tensors. The data of the original tensors is never read."""
    memo: dict[int, Any] = {}
    for tensor in _all_tensors(value):
        memo[id(tensor)] = _fake_tensor(tensor, mode)
    return copy.deepcopy(value, memo)


def _fake_tensor(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(twin, requires_grad=tensor.requires_grad)
    return twin.requires_grad_(tensor.requires_grad) if tensor.is_leaf else twin


def _all_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, nn.Module):
        for module in all_modules(value):
            yield from module.parameters(recurse=False)
            yield from module.buffers(recurse=False)
            # unregistered tensors, such as cached masks
            yield from (tensor for tensor in vars(module).values() if isinstance(tensor, Tensor))
    elif isinstance(value, tuple):
        for item in value:
            yield from _all_tensors(item)
    elif isinstance(value, Tensor):
        yield value


def typical_gamma(model: nn.Module) -> float:
    """Return the median |gamma| over the gains of a model. A gain on the meta device counts with its initial value."""
    found = []
    for module in all_modules(model):
        if isinstance(module, FixedGain):
            found.append(abs(module.value))
        elif isinstance(module, Gain):
            known = module.weight.device.type != "meta"
            found.append(float(module.weight.detach().abs().median()) if known else abs(module.init))
        elif isinstance(module, Cell) and (gamma := getattr(module.gain, "gamma", 0.0)) > 0:
            found.append(gamma)  # of a rewired block; with 0 the states are saved, so there are no lost bits
    return sorted(found)[len(found) // 2] if found else 1.0
