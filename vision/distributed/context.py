"""Distributed context of a run: ranks, collectives, and signals that stop all processes in an orderly way."""

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
    """The distributed context of this process. Every method must be called by all processes.

    Attributes:
        rank: Of this process over all machines. Rank 0 prints, logs and saves.
        size: Number of processes.
        local_rank: Rank of this process on its machine, which is the index of its GPU; 0 if srun exposes only one GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def replicas(self) -> World:
        """The processes that train on different batches: all of them, except in a pipeline."""
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
        """The maximum of a number over all processes."""
        return self._reduced(number, dist.ReduceOp.MAX)

    def _reduced(self, number: int, how: Any) -> int:
        if self.size == 1:
            return number
        value = torch.tensor(number)  # on the CPU, so that no process waits for a GPU
        dist.all_reduce(value, how)
        return int(value)

    def collect(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def by_main(self, work: Callable[[], T]) -> T:
        """Call a function in the main process and return its result in all processes, or raise its error in all."""
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
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()


class PipelineWorld(World):
    """The distributed context of a pipeline: all processes see the same batches, and each computes a part of the model.

    The first process has the images, the last one the outputs and the loss.
    """

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1

    @property
    def replicas(self) -> World:
        return World()

    def mean(self, values: Tensor) -> Tensor:
        """The tensor of the last process, since the others have no loss."""
        dist.broadcast(values, src=self.size - 1)
        return values


def world_for(parallel: str, world: World) -> World:
    """The distributed context for a kind of parallelism."""
    if parallel == "pipeline" and world.size > 1:
        return PipelineWorld(world.rank, world.size, world.local_rank)
    return world


LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # srun; SLURM_NTASKS is that of the whole allocation
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)
"""Environment variables of launchers: rank, number of processes, and rank on the machine."""

PATIENCE = 20.0
"""Seconds after which a process reports that it is waiting for the others."""


def world_of(variables: Mapping[str, str]) -> World:
    """The distributed context from the variables of the first launcher that has set them. Empty variables are ignored.

    Args:
        variables: Of the environment.

    Raises:
        revnets.SpecError: If a variable is missing or invalid, or the address of the processes cannot be resolved.
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
    """Check the rendezvous address, because processes would wait for a long time at a wrong one."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in given:
            raise _launch_error(name, f"is not set, but {reason}")
    host, port = given["MASTER_ADDR"], _number(given, "MASTER_PORT", 1)
    if port is not None and port > 65535:
        raise _launch_error("MASTER_PORT", f"{port} is not a port; the highest is 65535")
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise _launch_error("MASTER_ADDR", f"{host!r} cannot be resolved ({first_line(error)})") from None


def _launch_error(name: str, problem: str) -> ConfigError:
    hint = "Start several processes with torchrun, or unset the variable for a single process"
    return ConfigError("environment", name, problem, hint, code="invalid-environment")


def _is_task_of_srun(local_rank: int) -> bool:
    """Whether srun started this process directly. With --gpus-per-task=1 it exposes one GPU to each task, as number 0.

    If srun started torchrun, the local rank of a process differs from the one of the task.
    """
    return os.environ.get("SLURM_LOCALID", "").strip() == str(local_rank)


@contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The distributed context that torchrun, srun or mpirun describes; a single process without them.

    Args:
        device: Of the run. Tensors on GPUs use NCCL, tensors on the CPU use gloo.

    Raises:
        revnets.SpecError: If the launcher's variables are invalid, or the processes cannot connect.
        TrainingError: If the connection to another process is lost.
    """
    world = world_of(os.environ)
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu and world.local_rank and torch.cuda.device_count() == 1 and _is_task_of_srun(world.local_rank):
        world = replace(world, local_rank=0)
    if on_gpu and world.local_rank >= (count := torch.cuda.device_count()):
        problem = f"there is no GPU {world.local_rank}; this process has {count}"
        raise _launch_error("LOCAL_RANK", problem)
    if world.size == 1:
        yield world
        return
    if on_gpu:
        torch.cuda.set_device(world.local_rank)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    text = f"process {world.rank} of {world.size} is waiting for the others at {place}"
    waiting = threading.Timer(PATIENCE, print, (text,), {"file": sys.stderr, "flush": True})
    waiting.start()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", rank=world.rank, world_size=world.size)
    except (RuntimeError, ValueError) as error:
        problem = f"process {world.rank} of {world.size} cannot connect to the others at {place} ({first_line(error)})"
        hint = "Use a free port, and start all processes"
        raise ConfigError("environment", "MASTER_PORT", problem, hint, code="invalid-environment") from error
    finally:
        waiting.cancel()
    try:
        yield world
        world.wait()  # other processes may still wait for this one
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/transport" in str(error):  # gloo has no class for it
            problem = f"process {world.rank} lost its connection to another; if that printed no error, it was killed"
            raise TrainingError(
                f"{problem}. Start the run again to resume its last checkpoint", code="process-lost"
            ) from error
        raise
    finally:
        dist.destroy_process_group()


Handler = Callable[[int, FrameType | None], object] | int | None
"""Argument and result of `signal.signal`."""


class Stopped(Exception):
    """Raised at a point where the state of a run can be saved.

    Attributes:
        signal: That this or another process has received.
    """

    def __init__(self, number: int):
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


class StopSignals:
    """Context in which the first SIGTERM or SIGINT is only recorded. A second one has its usual effect.

    If one of several processes receives a signal, all stop. They ignore a second signal, because torchrun forwards a
    Ctrl-C that the terminal has already sent to every process.

    Attributes:
        received: The signal, or None.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, world: World | None = None) -> None:
        self.world = world or World()
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def check(self) -> None:
        """Stop if a signal was received. All processes must call it, at a point where the state can be saved.

        Raises:
            Stopped: If a process has received a signal.
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
        if threading.current_thread() is threading.main_thread():  # only this thread can set handlers
            self._before = {number: signal.signal(number, self._note) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()


def leave_signals_to_parent(_: int) -> None:
    """Ignore Ctrl-C in a loader's worker. It reaches all processes of a terminal, but the parent needs its batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
