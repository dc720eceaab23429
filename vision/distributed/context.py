"""The processes of a run: ranks, collectives, and the signals that ask them for an orderly end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from vision.errors import TrainingError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together. Every method is to be called by all of them.

    Attributes:
        rank: number of this process, of all machines; 0 prints, logs and saves.
        size: how many there are.
        local_rank: number of this process on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def sum(self, number: int) -> int:
        """The sum of a number over all processes."""
        return self._reduced(number, dist.ReduceOp.SUM)

    def max(self, number: int) -> int:
        """The largest of a number."""
        return self._reduced(number, dist.ReduceOp.MAX)

    def _reduced(self, number: int, how: Any) -> int:
        if self.size == 1:
            return number
        value = torch.tensor(number)  # on the CPU, whatever the device: nobody waits for a GPU here
        dist.all_reduce(value, how)
        return int(value)

    def collect(self, value: T) -> list[T]:
        """What every process has to say, by rank."""
        if self.size == 1:
            return [value]
        said: list[Any] = [None] * self.size
        dist.all_gather_object(said, value)
        return said

    def by_main(self, work: Callable[[], T]) -> T:
        """Let the main process do something and tell the others what came out; an error is raised in all of them."""
        if self.size == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def wait(self) -> None:
        """Wait until all are here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The world as torchrun describes it; alone without torchrun.

    Args:
        device: of the run; with GPUs tensors go by NCCL, and gloo carries what stays on the CPU.

    Raises:
        TrainingError: another process has gone, so nothing can be said to it any more.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World()
        return
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", "0")))
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=world.rank, world_size=world.size)
    try:
        yield world
        world.wait()  # nobody leaves while others still wait for it
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):  # gloo has no class for it
            problem = f"process {world.rank} has lost another of this run; if that one says no reason, it was killed"
            raise TrainingError(
                f"{problem}. Start the run again: it goes on from its last checkpoint", code="process-lost"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


Handler = Callable[[int, FrameType | None], object] | int | None
"""What `signal.signal` takes and gives back."""


class Stopped(Exception):
    """Raised where the work can be left: the state can be saved now.

    Attributes:
        signal: what has come, to this process or to another.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class StopSignals:
    """While active, the first SIGTERM or SIGINT is only noted; a second one does what it always does.

    Of several processes all stop if one is asked to. There a second signal is ignored: torchrun passes on a Ctrl-C
    that the terminal has given to every process already.

    Attributes:
        received: the signal, or None.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def check(self) -> None:
        """To be called where the work can be left, by all processes.

        Raises:
            Stopped: a signal has come to one of them.
        """
        if number := self.world.max(self.received or 0):
            raise Stopped(number)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if self.world.size == 1:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python delivers signals nowhere else
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def leave_signals_to_parent(_: int) -> None:
    """For a loader's workers: a Ctrl-C reaches all processes of a terminal, and the parent still wants its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
