"""Host memory in the search for what cells keep: options of cells that use it, and the work lost in waiting for it.

The copy of what a cell keeps runs beside the forward of the next cell, and the copy back beside the backward of that
cell. What a copy takes longer is waited for, and counts as the work that the device could do in that time.
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
    """Options that use host memory, for one model.

    Args:
        host: how much there is, and how fast the link and the device are.
        model: lies on the device whose speed is measured, if it is not given.
        dtype: of the model's products.
    """

    def __init__(self, host: HostMemory, model: nn.Module, dtype: torch.dtype):
        self.host = host
        self.limit = host.bytes  # of the bytes that a search may use
        self._model, self._dtype = model, dtype

    @cached_property
    def work_per_byte(self) -> float:
        """Operations that the device does while the link moves a byte."""
        flops = self.host.flops or measured_flops(_device_of(self._model), self._dtype)
        return flops / self.host.link

    def extended(
        self,
        cells: Sequence[Sequence[Option]],
        forward: Sequence[int],
        backward: Sequence[int],
        gradients: Sequence[int] = (),
    ) -> list[list[Option]]:
        """The options of each cell, and those that leave bytes behind once more, with host memory for these bytes.

        Args:
            cells: options of each cell, in the order of the forward.
            forward, backward: work of each cell without replays.
            gradients: bytes by which `Option.kept` of each cell is less than what it leaves behind: those of the
                gradients that take its room in backward. By default none.
        """
        beside = [*zip(forward[1:], backward[1:], strict=True), (0, 0)]
        return [
            [
                *options,
                *(
                    self._hosted(option, option.kept + more, works)
                    for option in options
                    if option.kept + more > 0 and not option.products  # which stay on the device
                ),
            ]
            for options, works, more in zip(cells, beside, gradients or [0] * len(cells), strict=True)
        ]

    def _hosted(self, option: Option, moved: int, beside: tuple[int, int]) -> Option:
        """The option with its bytes in host memory; while they are copied they are on the device as well."""
        copying = round(moved * self.work_per_byte)
        waits = sum(max(0, copying - work) for work in beside)
        return option._replace(
            kept=option.kept - moved,
            work=option.work + waits + copying // 100,  # so that the device is the first choice where there is room
            room=option.room - moved,
            host=moved,
            waits=waits,
        )

    def search(self, cells: Sequence[Sequence[Option]], room: int) -> list[Option] | None:
        """As `policy_search.search`, with at most `limit` bytes in host memory.

        Each byte there has a price in work, the lowest at which the choice stays within the limit (a Lagrange
        multiplier). It rises a little from cell to cell, or equal cells would all use host memory or none of them.
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
        """May a step use so many bytes? If not, the next search uses less."""
        if count <= self.host.bytes:
            return True
        self.limit = int(self.limit * self.host.bytes / count)
        return False


PRICES = 16
"""Prices of host memory that are tried."""


def least_kept(cells: Sequence[Sequence[Option]]) -> list[Option]:
    """The option of each cell that keeps its lost bits, in host memory where there is such an option."""
    return [min((option for option in options if option.replayed == LOST), key=_kept) for options in cells]


def _kept(option: Option) -> int:
    return option.kept


def measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that a device reaches in a matrix product, at best of a few."""
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
    """Where a model lies; a device of this machine for one on the meta device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type != "meta":
        return device
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return here or torch.device("cpu")
