"""Losses of predictions that are matched with objects."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from vision.detection.box_losses import giou_losses
from vision.detection.dino_detr.deformable_transformer import ScoredBoxes
from vision.detection.dino_detr.hungarian_matching import ALPHA, GAMMA, Pairs, in_pixels
from vision.detection.dino_detr.target_boxes import TargetBoxes
from vision.models.simulated_values import is_simulated

BOX_WEIGHT, GIOU_WEIGHT = 5.0, 2.0


def set_losses(
    predicted: ScoredBoxes, objects: Sequence[TargetBoxes], pairs: Sequence[Pairs], suffix: str = ""
) -> dict[str, Tensor]:
    """Return the losses of one set of predictions, divided by the mean number of pairs over all processes.

    Args:
        predicted: Predictions for Q queries.
        objects: Objects of each image.
        pairs: Matched queries and objects of each image. All other queries are background.
        suffix: Suffix of the names of the losses.

    Returns:
        `loss_class`, the sigmoid focal loss, `loss_box`, 5 times the L1 distance of boxes as fractions of the image,
        and `loss_giou`, 2 times 1 - generalized IoU.
    """
    scores, boxes = predicted.scores.float(), predicted.boxes.float()
    classes = torch.zeros_like(scores)
    for image, (item, (queries, numbers)) in enumerate(zip(objects, pairs, strict=True)):
        classes[image, queries, item.labels[numbers]] = 1
    count = positive_count(pairs, scores)
    found = torch.cat([boxes[image, pair.queries] for image, pair in enumerate(pairs)])
    wanted = torch.cat([item.boxes[pair.objects] for item, pair in zip(objects, pairs, strict=True)])
    sides = torch.cat([item.sides.expand(len(pair.queries), 4) for item, pair in zip(objects, pairs, strict=True)])
    focal = sigmoid_focal_loss(scores, classes, alpha=ALPHA, gamma=GAMMA, reduction="sum")
    distance = (found - wanted).abs().sum()
    giou = giou_losses(in_pixels(found, sides), in_pixels(wanted, sides)).sum()
    return {
        f"loss_class{suffix}": focal / count,
        f"loss_box{suffix}": BOX_WEIGHT * distance / count,
        f"loss_giou{suffix}": GIOU_WEIGHT * giou / count,
    }


def positive_count(pairs: Sequence[Pairs], like: Tensor) -> Tensor:
    """Return the number of pairs, at least 1, averaged over all processes."""
    count = like.new_tensor(float(sum(len(pair.queries) for pair in pairs)))
    if dist.is_available() and dist.is_initialized() and not is_simulated(like):
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count.clamp(min=1)
