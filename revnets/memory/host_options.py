"""Host memory in the policy search: options of cells that offload, and the compute lost while waiting for copies.

The copy to the host overlaps with the forward pass of the next cell, and the copy back with the backward pass of that
cell. If a copy takes longer, the device waits. The wait counts as the compute that the device could do in that time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import nn

from revnets.config.memory_budget import HostMemory
from revnets.memory.policy_search import LOST, Option, search


class HostOptions:
    """Options of the cells of one model that use host memory.

    Args:
        host: Size of the host memory, and speed of the link and of the device.
        model: Model on the device. The speed of this device is measured if `host` does not contain it.
        dtype: Dtype of the matrix products of the model.
    """

    def __init__(self, host: HostMemory, model: nn.Module, dtype: torch.dtype):
        self.host = host
        self.limit = host.bytes  # bytes that a search may use
        self._model, self._dtype = model, dtype

    @cached_property
    def work_per_byte(self) -> float:
        """Floating point operations of the device in the time in which the link moves one byte."""
        flops = self.host.flops or measured_flops(_device_of(self._model), self._dtype)
        return flops / self.host.link

    def extended(
        self,
        cells: Sequence[Sequence[Option]],
        forward: Sequence[int],
        backward: Sequence[int],
        gradients: Sequence[int] = (),
    ) -> list[list[Option]]:
        """Add to the options of each cell those that keep the same tensors in host memory.

        Args:
            cells: Options of each cell, in the order of the forward pass.
            forward: Compute cost of the forward pass of each cell.
            backward: Compute cost of the backward pass of each cell, without replays.
            gradients: Bytes of gradients that each cell allocates while backward frees what it saved. `Option.kept`
                is reduced by them. Zeros by default.

        Returns:
            The options of each cell, without and with host memory.
        """
        beside = [*zip(forward[1:], backward[1:], strict=True), (0, 0)]
        return [
            [
                *options,
                *(
                    self._hosted(option, option.kept + more, works)
                    for option in options
                    if option.kept + more > 0 and not option.products  # products stay on the device
                ),
            ]
            for options, works, more in zip(cells, beside, gradients or [0] * len(cells), strict=True)
        ]

    def _hosted(self, option: Option, moved: int, beside: tuple[int, int]) -> Option:
        """Return the option with its bytes in host memory. During the copy they are on the device as well."""
        copying = round(moved * self.work_per_byte)
        waits = sum(max(0, copying - work) for work in beside)
        return option._replace(
            kept=option.kept - moved,
            work=option.work + waits + copying // 100,  # a small price, so that free device memory is used first
            room=option.room - moved,
            host=moved,
            waits=waits,
        )

    def search(self, cells: Sequence[Sequence[Option]], room: int) -> list[Option] | None:
        """Run `policy_search.search` with at most `limit` bytes in host memory.

        Each byte in host memory has a price in compute, the lowest at which the choice stays within the limit (a
        Lagrange multiplier). The price rises slightly from cell to cell. Otherwise equal cells would use host memory
        all together or not at all.

        Args:
            cells: Options of each cell, in the order of the forward pass.
            room: Bytes that all cells together may keep on the device.

        Returns:
            One option per cell, or None if nothing fits.
        """

        def priced(place: int, option: Option, price: float) -> Option:
            rise = 1 + place / (8 * len(cells))
            return option._replace(work=option.work + round(price * rise * option.host))

        def at(price: float) -> list[Option] | None:
            return search([[priced(k, one, price) for one in options] for k, options in enumerate(cells)], room)

        found = at(0.0)
        if found is None or self._fits(found):
            return found
        best, low, high = None, 0.0, self.work_per_byte
        for _ in range(PRICES):
            price = high if best is None else (low + high) / 2
            found = at(price)
            if found is not None and self._fits(found):
                best, high = found, price
            elif best is None:
                low, high = high, 8 * high
            else:
                low = price
        return best

    def _fits(self, found: Sequence[Option]) -> bool:
        return sum(option.host for option in found) <= self.limit

    def takes(self, count: int) -> bool:
        """Return True if a step may use this many bytes of host memory, else lower the limit of the next search."""
        if count <= self.host.bytes:
            return True
        self.limit = int(self.limit * self.host.bytes / count)
        return False


PRICES = 16
"""Number of prices that the search tries."""


def least_kept(cells: Sequence[Sequence[Option]]) -> list[Option]:
    """Return the smallest option of each cell that saves its lost bits, in host memory if possible."""
    return [min((option for option in options if option.replayed == LOST), key=_kept) for options in cells]


def _kept(option: Option) -> int:
    return option.kept


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating point operations per second of a device: the best of four matrix products."""
    side = 512 if device.type == "cpu" else 4096
    factor = torch.ones(side, side, dtype=dtype, device=device)
    seconds = min(_seconds(lambda: factor @ factor, device) for _ in range(4))
    return 2 * side**3 / seconds


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _device_of(model: nn.Module) -> torch.device:
    """Return the device of a model, or the accelerator (or CPU) of this machine for a model on the meta device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return here or torch.device("cpu")
