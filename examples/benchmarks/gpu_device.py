"""Time and memory of training steps on one device, within a limit of time, and what becomes of those that fail."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from revnets.memory.tracker import MemoryTracker


@dataclass
class Device:
    """A CUDA device, whose clock and allocator are asked, or the CPU, where a tracker counts tensors."""

    name: str

    @property
    def is_cuda(self) -> bool:
        return torch.device(self.name).type == "cuda"

    @property
    def type(self) -> str:
        return torch.device(self.name).type

    @property
    def words(self) -> str:
        return torch.cuda.get_device_name(self.name) if self.is_cuda else "CPU"

    def synchronize(self) -> None:
        """Wait for all kernels, so that an error is raised by the measurement that it belongs to."""
        if self.is_cuda:
            torch.cuda.synchronize(self.name)

    def empty(self) -> None:
        """Give back what the measurement before has left."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def milliseconds(self, step: Callable[[], Any], rounds: int) -> list[float]:
        """Of each of some steps; call the step before, for it may compile, tune kernels and fill caches.

        On CUDA by events, which the device itself notes, one pair a step and a single wait at the end. On the CPU the
        process's own seconds.
        """
        if not self.is_cuda:
            found = []
            for _ in range(rounds):
                start = time.process_time()
                step()
                found.append(1e3 * (time.process_time() - start))
            return found
        self.synchronize()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
        for begin, end in events:
            begin.record()
            step()
            end.record()
        self.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    def peak(self, step: Callable[[], Any]) -> int:
        """By how many bytes a step raises what is allocated, at its highest; call the step before.

        The device's caches, such as the workspace of its matrix products, are there already and do not count.
        """
        if not self.is_cuda:
            with MemoryTracker() as tracker:
                step()
            return tracker.peak
        self.synchronize()
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.name)
        before = torch.cuda.memory_allocated(self.name)
        step()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.name) - before


def median(values: list[float]) -> float:
    return statistics.median(values)


@dataclass
class Run:
    """What has been measured so far, and how long there is left.

    Attributes:
        rows: Of each section, one row a measurement: its `status` is `ok`, `out of memory`, `failed`, `dropped` (no
            time was left) or `not here` (something is not installed, or the device lacks it).
    """

    device: Device
    seconds: float
    tell: Callable[[str], None] = print
    start: float = field(default_factory=time.monotonic)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.start)

    def measure(self, section: str, keys: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Add a row: `keys` identify it, `work` returns its figures. An error becomes its status.

        Returns:
            The row.
        """
        row: dict[str, Any] = dict(keys)
        self.rows.setdefault(section, []).append(row)
        if self.left <= 0:
            row["status"] = "dropped"
            return row
        begin = time.monotonic()
        try:
            row |= {"status": "ok", **work()}
            self.device.synchronize()
        except torch.OutOfMemoryError:
            row["status"] = "out of memory"
        except ImportError as error:
            row |= {"status": "not here", "error": _first_line(error)}
        except RuntimeError as error:
            absent = "No available kernel" in str(error)  # of attention, for this device, dtype and shape
            row |= {"status": "not here" if absent else "failed", "error": f"RuntimeError: {_first_line(error)}"}
        except Exception as error:  # the others are measured all the same; this one says why it was not
            row |= {"status": "failed", "error": f"{type(error).__name__}: {_first_line(error)}"}
        row["seconds"] = round(time.monotonic() - begin, 2)
        with suppress(RuntimeError):  # of a device that an error has left unusable: the rows so far are worth keeping
            self.device.empty()  # behind the handlers: an error's traceback holds the tensors of its step
        self.tell(f"{section}: {', '.join(map(str, keys.values()))}: {row['status']} {row.get('error', '')}")
        return row

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = {
            "device": {**asdict(self.device), "words": self.device.words},
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "seconds": round(time.monotonic() - self.start, 1),
            "limit_seconds": self.seconds,
            "dropped": sum(row["status"] == "dropped" for rows in self.rows.values() for row in rows),
            "sections": self.rows,
        }
        if self.device.is_cuda:
            found["device"]["memory"] = torch.cuda.get_device_properties(self.device.name).total_memory
        return found


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
