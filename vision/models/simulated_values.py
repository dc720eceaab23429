"""Value-dependent choices that also work in the simulated step of a memory plan.

A plan simulates a step on tensors that have shapes but no values. Where the shape of a result depends on values, these
functions assume the largest one that the model allows, so the plan is an upper bound.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor


def is_simulated(tensor: Tensor) -> bool:
    """Return True if a tensor has a shape but no values."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def rows_where(mask: Tensor, most: int) -> Tensor:
    """Return the indices (K,) where a mask (N,) is true.

    Args:
        mask: Booleans.
        most: The largest possible K. In a simulated step, K is the smaller one of this and N.
    """
    if is_simulated(mask):
        return torch.arange(min(most, len(mask)), device=mask.device)
    return mask.nonzero().squeeze(1)


def assigned_pairs(cost: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows and columns of the assignment with the least total cost, min(N, M) pairs of a matrix (N, M)."""
    if is_simulated(cost):
        rows = torch.arange(min(cost.shape), device=cost.device)
        return rows, rows
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(rows, device=cost.device), torch.as_tensor(columns, device=cost.device)


def use_local_statistics(model: nn.Module) -> None:
    """Turn SyncBatchNorm layers into BatchNorm layers, because a simulated step has one process and no GPU."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = nn.BatchNorm2d  # pyright: ignore[reportAttributeAccessIssue]
