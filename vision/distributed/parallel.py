"""Training with several processes: DDP, or FSDP2 that gathers and releases cell by cell."""

from __future__ import annotations

import warnings
from typing import cast

import torch
from timm.task import TrainingTask
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from revnets import ReversibleColumns
from vision.distributed.context import World


def distribute(task: TrainingTask, how: str, world: World, device: torch.device) -> None:
    """Distribute a task over processes, all of which have the same weights.

    Args:
        task: timm's task.
        how: `ddp`, where each process has all weights; or `fsdp`, which shards weights, gradients, averages and
            optimizer state. The tape gathers weights again, cell by cell, to rebuild states.
        world: The processes of the run.
        device: Of this process.
    """
    if how == "ddp":
        # The gradient of a depthwise kernel has another stride along its axis of length 1, which has no effect.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
        return
    shard(task.get_trainable_module(), world, device)
    average = cast(ModelEmaV3 | None, task.get_trainable_module(ema=True))
    if average is not None:
        shard(average.module, world, device)


def shard(model: nn.Module | None, world: World, device: torch.device) -> None:
    """Apply `fully_shard` to every cell of reversible columns, and to the rest of the model as one group."""
    assert model is not None
    mesh = init_device_mesh(device.type, (world.size,))
    for module in list(model.modules()):
        if isinstance(module, ReversibleColumns):
            for cell in module.flat():
                fully_shard(cell, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # so that a state dict only has parts
    if device.type == "cpu":
        average_with_gloo(model)


def average_with_gloo(model: nn.Module) -> None:
    """Let FSDP2 average gradients over processes with gloo, where older versions of PyTorch sum them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # followed by a division


def release_gathered(model: nn.Module) -> None:
    """Release weights that are still gathered after a forward pass without backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
