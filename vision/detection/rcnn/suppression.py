"""Selection of detections: score thresholds and non-maximum suppression."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

LEAST_SOFT_SCORE = 1e-3


def best_detections(
    scores: Tensor,
    boxes: Tensor,
    size: tuple[int, int],
    *,
    threshold: float = 0.05,
    overlap: float = 0.5,
    limit: int = 100,
    soft: bool = False,
) -> dict[str, Tensor]:
    """Return the best boxes of an image in the format of torchvision's detectors, best first.

    Args:
        scores: Probabilities (n, classes + 1), background first.
        boxes: (n, classes + 1, 4).
        size: Height and width of the image.
        threshold: Scores must be higher than this.
        overlap: Intersection over union above which a box suppresses others of its class.
        limit: Maximum number of boxes.
        soft: Lower the scores of overlapping boxes (`soft_nms`) instead of removing them.
    """
    row, label = (scores[:, 1:] > threshold).nonzero(as_tuple=True)
    label = label + 1
    scores, boxes = scores[row, label], clip_boxes_to_image(boxes[row, label], size)
    if soft:
        kept, scores = soft_nms(boxes, scores, label, overlap, limit)
    else:
        kept = batched_nms(boxes, scores, label, overlap)[:limit]
        scores = scores[kept]
    return {"boxes": boxes[kept], "labels": label[kept], "scores": scores}


def soft_nms(boxes: Tensor, scores: Tensor, labels: Tensor, overlap: float, limit: int) -> tuple[Tensor, Tensor]:
    """Linear Soft-NMS (Bodla et al., "Soft-NMS", 2017).

    Each selected box multiplies the scores of the other boxes of its class by one minus their intersection over union,
    where that exceeds `overlap`.

    Args:
        boxes: (n, 4).
        scores: (n,).
        labels: Classes (n,).
        overlap: Intersection over union above which scores are lowered.
        limit: Maximum number of boxes.

    Returns:
        Indices of the selected boxes and their lowered scores, best first. Scores below 0.001 are omitted.
    """
    left, kept, lowered = scores.clone(), [], []
    while len(kept) < min(limit, len(scores)):
        best = left.argmax()
        if left[best] < LEAST_SOFT_SCORE:
            break
        kept.append(best)
        lowered.append(left[best].clone())
        iou = box_iou(boxes[best][None], boxes)[0]
        left = torch.where((labels == labels[best]) & (iou > overlap), left * (1 - iou), left)
        left[best] = -1
    if not kept:
        return labels.new_zeros(0), scores.new_zeros(0)
    return torch.stack(kept), torch.stack(lowered)
