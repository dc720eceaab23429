"""The generalized IoU loss of boxes (Rezatofighi et al., "Generalized Intersection over Union", CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-7
"""Added to areas before a division."""


def giou_losses(boxes: Tensor, goals: Tensor) -> Tensor:
    """Return one minus the generalized IoU of pairs of boxes.

    Values and gradients equal those of `torchvision.ops.generalized_box_iou_loss`, which selects boxes by value and
    therefore cannot run in the simulated step of a memory plan.

    Args:
        boxes: (..., 4) as left, top, right, bottom.
        goals: Of the same shape.

    Returns:
        (...), in float32 at least.
    """
    boxes, goals = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (boxes, goals))
    left, top, right, bottom = boxes.unbind(-1)
    goal_left, goal_top, goal_right, goal_bottom = goals.unbind(-1)
    inner_left, inner_top = torch.max(left, goal_left), torch.max(top, goal_top)
    inner_right, inner_bottom = torch.min(right, goal_right), torch.min(bottom, goal_bottom)
    overlaps = (inner_bottom > inner_top) & (inner_right > inner_left)
    inner = (inner_right - inner_left) * (inner_bottom - inner_top)
    common = torch.where(overlaps, inner, torch.zeros_like(inner))
    areas = (right - left) * (bottom - top), (goal_right - goal_left) * (goal_bottom - goal_top)
    union = areas[0] + areas[1] - common
    width = torch.max(right, goal_right) - torch.min(left, goal_left)
    height = torch.max(bottom, goal_bottom) - torch.min(top, goal_top)
    around = width * height
    return 1 - (common / (union + EPSILON) - (around - union) / (around + EPSILON))
