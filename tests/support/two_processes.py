"""Tests in two or more processes with gloo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import FSDPModule

from tests.support.multiprocess import processes

PROCESSES = 2


def in_two_processes(work: Callable[[int], None], directory: Path, size: int = PROCESSES) -> None:
    """Run `work(rank)` in each process. A failed assertion in a process fails the test."""
    arguments = (work, str(directory / "rendezvous"), size)
    mp.start_processes(_enter, arguments, nprocs=size, start_method=processes.get_start_method())


def _enter(rank: int, work: Callable[[int], None], rendezvous: str, size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    try:
        work(rank)
        dist.barrier()  # the other process may still be waiting for this one
        _leave_together(rank, size)
    finally:
        dist.destroy_process_group()


def _leave_together(rank: int, size: int) -> None:
    """Wait until all processes have left the barrier. Closing connections earlier could break it for others."""
    store = dist.distributed_c10d._get_default_store()
    store.set(f"left{rank}", "")
    store.wait([f"left{other}" for other in range(size)])


def average_gradients(model: nn.Module) -> None:
    """Let FSDP2 average gradients with gloo, where older versions of PyTorch sum them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # followed by a division
