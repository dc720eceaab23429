"""The tensors that each cell of a model saves for backward, in order, and the compute that precedes each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from revnets.engine.cell import Cell
from revnets.engine.columns_group import find_columns
from revnets.engine.memory_mode import Memory
from revnets.memory.simulation import fake, total, without_packing
from revnets.memory.tracker import MemoryTracker, OpCounter, Product


class SavedTensor(NamedTuple):
    """A tensor that a cell saves for backward.

    Attributes:
        nbytes: Bytes of its storage; 0 if the storage existed before the cell or belongs to an earlier saved tensor.
        work: Compute cost of the forward pass up to this tensor, in units of `OpCounter.work`.
    """

    nbytes: int
    work: int


@dataclass(frozen=True, slots=True)
class CellCost:
    """What all calls of a cell save under plain autograd, and what they compute.

    Attributes:
        kept: Bytes saved for backward.
        flops: Floating point operations.
        work: Compute cost, in units of `OpCounter.work`.
        gradients: Bytes of the gradients of its parameters.
        saved: Saved tensors of the last call.
        products: Matrix products of the last call. Their `end` counts from the beginning of that call.
    """

    kept: int
    flops: int
    work: int
    gradients: int
    saved: tuple[SavedTensor, ...]
    products: tuple[Product, ...] = ()


def costs_of_cells(
    model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype = torch.float32
) -> dict[int, CellCost]:
    """Compute the cost of each cell of a model on fake copies of the model and its inputs.

    Args:
        model: Module with reversible columns.
        inputs: Positional arguments of its forward pass. Only shapes and dtypes matter.
        dtype: float32, or bfloat16 or float16 for autocast.

    Returns:
        Costs by cell index (see `ColumnsGroup.stored`), in the order of the forward pass.
    """
    found: dict[int, CellCost] = {}
    with FakeTensorMode() as mode:
        model, inputs = fake((model, inputs), mode)
        columns = find_columns(model)
        columns.memory = Memory.STORE
        indices = columns.call_indices()
        with without_packing((inputs, vars(model))), MemoryTracker() as tracker, OpCounter() as counter:
            calls: list[_Call] = []

            def begin(*_: Any) -> None:
                calls.append(_Call(tracker, counter))

            def end(cell: nn.Module, *_: Any) -> None:
                kept, flops, work, saved, products = calls.pop().end()
                index = next(indices[cast(Cell, cell)])
                known = found.get(index, CellCost(0, 0, 0, 0, ()))  # of an earlier call, if the columns run twice
                sums = known.kept + kept, known.flops + flops, known.work + work
                found[index] = CellCost(*sums, _gradients(cell), saved, products)

            for cell in indices:
                cell.register_forward_pre_hook(begin)
                cell.register_forward_hook(end)
            tracker.register(model)
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                outputs: Tensor = total(model(*inputs))
            del outputs
    return found


class _Call:
    """Records what one call of a cell saves and computes, from construction until `end`."""

    def __init__(self, tracker: MemoryTracker, counter: OpCounter):
        self.tracker, self.counter = tracker, counter
        self.live, self.flops, self.work = tracker.live, counter.flops, counter.work
        self.products = len(counter.products)
        self.known = tracker.storages()
        self.saved: list[SavedTensor] = []
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def _pack(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        nbytes = 0 if key in self.known else tensor.untyped_storage().nbytes()
        self.known.add(key)
        self.saved.append(SavedTensor(nbytes, self.counter.work - self.work))
        return tensor.detach()

    def end(self) -> tuple[int, int, int, tuple[SavedTensor, ...], tuple[Product, ...]]:
        """Stop recording; return bytes kept, FLOPs, compute cost, saved tensors and matrix products."""
        self.hooks.__exit__(None, None, None)
        counter = self.counter
        return (
            self.tracker.live - self.live,
            counter.flops - self.flops,
            counter.work - self.work,
            tuple(self.saved),
            tuple(product._replace(end=product.end - self.work) for product in counter.products[self.products :]),
        )


def _gradients(cell: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in cell.parameters() if parameter.requires_grad)
