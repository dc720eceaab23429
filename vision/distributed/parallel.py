"""Several processes: DDP, or FSDP2 with every cell gathered and released on its own."""

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
    """Let the processes of the world share the work of a task. Before this all have the same weights.

    Args:
        how: `ddp`: each has all weights; or `fsdp`: each has its part of weights, gradients, averages and the state
            of the optimizer. The tape rebuilds states with the weights gathered again, cell by cell.
    """
    if how == "ddp":
        # The gradient of a depthwise kernel has another stride along its axis of length 1, which means nothing.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
        return
    shard(task.get_trainable_module(), world, device)
    average = cast(ModelEmaV3 | None, task.get_trainable_module(ema=True))
    if average is not None:
        shard(average.module, world, device)


def shard(model: nn.Module | None, world: World, device: torch.device) -> None:
    """`fully_shard` every cell of reversible columns, and what is left of the model as one group."""
    assert model is not None
    mesh = init_device_mesh(device.type, (world.size,))
    for module in list(model.modules()):
        if isinstance(module, ReversibleColumns):
            for cell in module.flat():
                fully_shard(cell, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # also at the top, so that a state has the parts alone


def release_gathered(model: nn.Module) -> None:
    """Release weights that a forward pass without backward has left gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
