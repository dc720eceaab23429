"""What one training step would take, found without taking it: the step runs on fake tensors under a counter of bytes.

Fake tensors have shapes and no memory, so a net far larger than the machine can be looked at. Everything takes part
that takes part in a real step: autograd's saved tensors, the engine's tape, replays, gradients as they come. Only the
lost bits have no values to look at; their length is what is usual at the net's |gamma| (`lost_bits.expected_bytes`).
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
    """Bytes of one training step, and its work."""

    parameters: int  # parameters and buffers
    kept: int  # alive between forward and backward because of the forward
    peak: int  # most bytes alive at once, parameters included, and gradients if they are kept
    flops: int  # of matrix products and convolutions, forward and backward
    work: int  # the same and bytes written, see `OpCounter.work`
    cells: CellUses  # what takes part in it cell by cell
    host: int  # most bytes in host memory at once


def simulate(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype = torch.float32,
    keep_gradients: bool = True,
    accumulates: bool = False,
) -> Footprint:
    """Run forward and backward of a model on fake copies of itself and its inputs.

    Args:
        model: any module; it may lie on the meta device. Its memory modes are taken as they are.
        inputs: positional arguments of its forward; only their shapes and dtypes matter.
        dtype: float32, or bfloat16 or float16 for autocast.
        keep_gradients: False lets every gradient leave as soon as it is whole, as sharded training does.
        accumulates: gradients of an earlier batch are there already, and the new ones are added to them.
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
    """Let transformers take position ids that a model makes itself for those of one text a row.

    It asks their values whether several texts are packed into a row, and without values it assumes so: then each step
    would have a mask for all pairs of positions that a real one does not have.

    Args:
        inputs: nest of the tensors that are given to the model; position ids among them may be packed.
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
    """The function of transformers, but in threads that simulate a step it looks at given tensors alone."""

    @wraps(original)
    def find(position_ids: Tensor) -> Tensor | None:
        is_made = _thread.given is not None and storage_key(position_ids) not in _thread.given
        return None if is_made else original(position_ids)

    return find


class _Thread(threading.local):
    given: set[Any] | None = None  # storages of the tensors that a simulated model is given


_thread, _lock = _Thread(), threading.Lock()
_running: list[Any] = []  # the function of transformers, once for each simulation of any thread


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def total(outputs: Any) -> Tensor:
    """A scalar that every differentiable output takes part in."""
    terms = [tensor.float().mean() for tensor in tensors(outputs) if tensor.requires_grad]
    if not terms:
        raise ArgumentError(
            "no output of the model requires a gradient, so there is no training step to look at",
            "model",
            code="no-gradient",
        )
    return torch.stack(terms).sum()


def fake(value: Any, mode: FakeTensorMode) -> Any:
    """A deep copy in which every tensor is a fake one on the CPU; the memory of the original is never touched."""
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
            # unregistered tensors, such as masks that are made once
            yield from (tensor for tensor in vars(module).values() if isinstance(tensor, Tensor))
    elif isinstance(value, tuple):
        for item in value:
            yield from _all_tensors(item)
    elif isinstance(value, Tensor):
        yield value


def typical_gamma(model: nn.Module) -> float:
    """The median |gamma| of a model's gains; of freshly built ones on the meta device, their first value."""
    found = []
    for module in all_modules(model):
        if isinstance(module, FixedGain):
            found.append(abs(module.value))
        elif isinstance(module, Gain):
            known = module.weight.device.type != "meta"
            found.append(float(module.weight.detach().abs().median()) if known else abs(module.init))
        elif isinstance(module, Cell) and (gamma := getattr(module.gain, "gamma", 0.0)) > 0:
            found.append(gamma)  # of a rewired block; 0 keeps the states, and there are no lost bits
    return sorted(found)[len(found) // 2] if found else 1.0
