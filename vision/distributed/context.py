"""The processes of a run: ranks, collectives, and the signals that ask them for an orderly end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from revnets.config.errors import ConfigError
from vision.errors import TrainingError, first_line

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among those that train together. Every method is to be called by all of them.

    Attributes:
        rank: number of this process, of all machines; 0 prints, logs and saves.
        size: how many there are.
        local_rank: number of this process on its machine, and so of its GPU; 0 if srun shows it no other GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> World:
        """This process among those that each train on batches of their own: all of them, but in a pipeline."""
        return self

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


class PipelineWorld(World):
    """The processes of a pipeline: all see the same batches, and each computes a part of the model.

    The first one has the images, the last one the outputs and the loss.
    """

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def replicas(self) -> World:
        return World()

    def mean(self, values: Tensor) -> Tensor:
        """The tensor of the last process; the others have none."""
        dist.broadcast(values, src=self.size - 1)
        return values


def world_for(parallel: str, world: World) -> World:
    """The processes of a run that shares its work in this way."""
    if parallel == "pipeline" and world.size > 1:
        return PipelineWorld(world.rank, world.size, world.local_rank)
    return world


LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; SLURM_NTASKS is that of the whole allocation
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)
"""Environment variables from which a process knows its rank, the number of processes, and its rank on its machine."""

PATIENCE = 20.0
"""Seconds after which a process reports that it is waiting for the others."""


def world_of(variables: Mapping[str, str]) -> World:
    """The world that a launcher describes; the first one whose variables are set counts. An empty one is not set.

    Args:
        variables: of the environment.

    Raises:
        revnets.SpecError: a variable is missing or cannot be used, or processes could not find one another.
    """
    given = {name: value.strip() for name, value in variables.items() if value.strip()}
    names = next((names for names in LAUNCHERS if names[0] in given or names[1] in given), None)
    if names is None:
        return World()
    rank_name, size_name, local_name = names
    size = _number(given, size_name, 1)
    if size is None and _number(given, rank_name, 0):
        raise _launch_error(size_name, f"is not set, but {rank_name} is {given[rank_name]}")
    if size is None or (size == 1 and rank_name not in given):
        return World()
    rank = _number(given, rank_name, 0)
    if rank is None:
        raise _launch_error(rank_name, f"is not set, but {size_name} is {size}")
    if rank >= size:
        raise _launch_error(rank_name, f"{rank} is not a rank of {size_name}={size} processes")
    if size > 1:
        _require_address(given, f"{size_name} is {size}")
    return World(rank, size, _number(given, local_name, 0) or 0)


def _number(given: Mapping[str, str], name: str, least: int) -> int | None:
    if name not in given:
        return None
    text = given[name]
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and int(text) >= least):
        raise _launch_error(name, f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _require_address(given: Mapping[str, str], reason: str) -> None:
    """Check the address at which the processes meet. With a wrong one they would wait for a long time."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in given:
            raise _launch_error(name, f"is not set, but {reason}")
    host, port = given["MASTER_ADDR"], _number(given, "MASTER_PORT", 1)
    if port is not None and port > 65535:
        raise _launch_error("MASTER_PORT", f"{port} is not a port; the highest is 65535")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise _launch_error("MASTER_ADDR", f"{host!r} cannot be found ({first_line(error)})") from None


def _launch_error(name: str, problem: str) -> ConfigError:
    remedy = "Start several processes with torchrun, or unset it for one alone"
    return ConfigError("environment", name, problem, remedy, code="invalid-environment")


def _is_task_of_srun(local_rank: int) -> bool:
    """Has srun started this process itself? With --gpus-per-task=1 it shows each task one GPU, as number 0.

    Processes of a torchrun that srun has started have another number than the task.
    """
    return os.environ.get("SLURM_LOCALID", "").strip() == str(local_rank)


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The world as torchrun, srun or mpirun describes it; alone without them.

    Args:
        device: of the run; with GPUs tensors go by NCCL, and gloo carries what stays on the CPU.

    Raises:
        revnets.SpecError: the launcher's variables cannot be used, or the processes do not meet.
        TrainingError: another process has ended, so it cannot be reached any more.
    """
    world = world_of(os.environ)
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu and world.local_rank and torch.cuda.device_count() == 1 and _is_task_of_srun(world.local_rank):
        world = replace(world, local_rank=0)
    if on_gpu and world.local_rank >= (count := torch.cuda.device_count()):
        problem = f"{world.local_rank} is no GPU of this machine, which shows {count} to this process"
        raise _launch_error("LOCAL_RANK", problem)
    if world.size == 1:
        yield world
        return
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = f"process {world.rank} of {world.size} waits for the others at {place}"
    waiting = threading.Timer(PATIENCE, print, (text,), {"file": sys.stderr, "flush": True})
    waiting.start()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=world.rank, world_size=world.size)
    except (RuntimeError, ValueError) as error:
        problem = f"process {world.rank} of {world.size} does not meet the others at {place} ({first_line(error)})"
        remedy = "Give a port that is free, and start all of them"
        raise ConfigError("environment", "MASTER_PORT", problem, remedy, code="invalid-environment") from error
    finally:
        waiting.cancel()
    try:
        yield world
        world.wait()  # other processes may still wait for this one
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
