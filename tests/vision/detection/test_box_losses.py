"""The generalized IoU loss."""

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision.ops import generalized_box_iou_loss

from vision.detection.box_losses import giou_losses


def random_boxes(generator, shape=(61,)):
    corners = torch.randint(0, 23, (*shape, 2), generator=generator)
    return torch.cat([corners, corners + torch.randint(0, 17, (*shape, 2), generator=generator)], -1).float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_torchvision(dtype):
    """The boxes overlap, touch or are disjoint, and some have no area."""
    generator = torch.Generator().manual_seed(0)
    boxes, goals = (random_boxes(generator).to(dtype) for _ in range(2))
    results = []
    for losses in (giou_losses, generalized_box_iou_loss):
        given = boxes.clone().requires_grad_()
        found = losses(given, goals)
        found.sum().backward()
        results.append((found.detach(), given.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
