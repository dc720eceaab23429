"""Mask heads (He et al., "Mask R-CNN", 2017), their targets, and pasting of masks into images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import roi_align

from vision.detection.rcnn.box_heads import SampledBoxes
from vision.detection.training_targets import Target


class MaskHead(nn.Module):
    """Four convolutions and a transposed one that predict a mask of twice the pooled size for each class.

    Args:
        channels: Channels of the pooled features.
        num_classes: Number of classes without background.
        width: Channels of the convolutions.
        flow: Whether to add the features of the previous mask head after a 1 x 1 convolution and a ReLU (HTC).
    """

    def __init__(self, channels: int, num_classes: int, width: int = 256, *, flow: bool = False):
        super().__init__()
        self.convolutions = MaskRCNNHeads(channels, [width] * 4, 1)
        self.predictor = MaskRCNNPredictor(width, width, num_classes + 1)
        self.flow = nn.Sequential(nn.Conv2d(width, channels, 1), nn.ReLU()) if flow else None

    def features(self, pooled: Tensor, previous: Tensor | None = None) -> Tensor:
        """Map pooled features (boxes, channels, S, S) to features (boxes, width, S, S)."""
        if self.flow is not None and previous is not None:
            pooled = pooled + self.flow(previous)
        return self.convolutions(pooled)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled features (boxes, channels, S, S) to logits (boxes, classes + 1, 2 S, 2 S)."""
        return self.predictor(self.features(pooled))


def mask_loss(logits: Tensor, samples: SampledBoxes, targets: Sequence[Target]) -> Tensor:
    """Return the mean binary cross entropy of the masks of boxes, each for the class of its object; 0 without boxes.

    Args:
        logits: (boxes, classes + 1, S, S).
        samples: The boxes, each of which has an object.
        targets: Targets of the images, with `masks` (N, H, W).
    """
    if not len(logits):
        return logits.sum()
    labels = samples.labels(targets)
    rows = torch.arange(len(labels), device=labels.device)
    return F.binary_cross_entropy_with_logits(
        logits[rows, labels].float(), mask_goals(samples, targets, logits.shape[-1])
    )


def mask_goals(samples: SampledBoxes, targets: Sequence[Target], size: int) -> Tensor:
    """Return the masks of the objects within their boxes, resized and rounded to 0 or 1, (boxes, size, size)."""
    goals = []
    for boxes, matches, target in zip(samples.boxes, samples.matches, targets, strict=True):
        rois = torch.cat([matches[:, None].to(boxes.dtype), boxes], 1)
        masks = target["masks"][:, None].to(boxes.dtype)
        pooled = roi_align(masks, rois, size, 1.0, 0, aligned=True) if len(rois) else boxes.new_zeros(0, 1, size, size)
        goals.append((pooled[:, 0] >= 0.5).to(boxes.dtype))
    return torch.cat(goals)


def pasted_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Paste masks (N, S, S) into boxes (N, 4) of an image: (N, 1, height, width), 0 outside the boxes.

    Values are interpolated at the centers of pixels, as in detectron2 and mmdetection.
    """
    height, width = size
    pasted = masks.new_zeros(len(masks), 1, height, width)
    for place, mask, box in zip(pasted, masks, boxes, strict=True):
        left, top, right, bottom = (float(edge) for edge in box)
        if right <= left or bottom <= top:
            continue
        rows = slice(max(int(top) - 1, 0), min(int(bottom) + 2, height))
        columns = slice(max(int(left) - 1, 0), min(int(right) + 2, width))
        y = (torch.arange(rows.start, rows.stop, device=mask.device) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        x = (torch.arange(columns.start, columns.stop, device=mask.device) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], -1)
        place[:, rows, columns] = F.grid_sample(mask[None, None], grid[None].to(mask.dtype), align_corners=False)[0]
    return pasted
