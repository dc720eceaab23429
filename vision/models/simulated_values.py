"""Choices by value, in a training step that has no values: the simulated step of a memory plan.

A plan runs a step on tensors with shapes alone. Where the shape of the next tensor depends on values, these functions
assume the largest one that the model allows, so that the plan is an upper bound.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor


def is_simulated(tensor: Tensor) -> bool:
    """Whether a tensor has a shape and no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def chosen_rows(mask: Tensor, most: int) -> Tensor:
    """The indices (K,) where a mask (N,) is true.

    Args:
        mask: booleans.
        most: the largest K that is possible; a simulated step has that many, but at most N.
    """
    if is_simulated(mask):
        return torch.arange(min(most, len(mask)), device=mask.device)
    return mask.nonzero().squeeze(1)


def assigned_pairs(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The rows and columns of the assignment with the least cost, min(N, M) pairs of a matrix (N, M)."""
    if is_simulated(cost):
        rows = torch.arange(min(cost.shape), device=cost.device)
        return rows, rows
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def use_local_statistics(model: nn.Module) -> None:
    """Turn SyncBatchNorm layers into BatchNorm: a simulated step runs in one process, and on no GPU."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d
