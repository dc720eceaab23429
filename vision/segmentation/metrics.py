"""Mean intersection over union for semantic segmentation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vision.distributed.context import World


@dataclass(frozen=True, slots=True)
class SegmentationMetrics:
    """Metrics of one set of weights, in percent.

    Attributes:
        miou: Mean IoU of the classes that occur in maps or predictions.
        all_accuracy: Accuracy of all pixels (aAcc).
        mean_accuracy: Mean accuracy of the classes that occur in maps (mAcc).
        iou: IoU of every class (classes,); NaN for classes that do not occur.
        pixels: Number of evaluated pixels.
    """

    miou: float
    all_accuracy: float
    mean_accuracy: float
    iou: Tensor
    pixels: int

    def scalars(self) -> dict[str, float]:
        """Return the metrics for logs."""
        return {"miou": self.miou, "aacc": self.all_accuracy, "macc": self.mean_accuracy}


class IoUEvaluator:
    """Accumulates the confusion matrix of pixels.

    Args:
        num_classes: Number of classes. Pixels of other classes, such as 255, do not count.
        device: Device of the model.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)

    def update(self, output: Iterable[Tensor], batch: Iterable[Tensor]) -> None:
        """Add predicted classes (H, W) and class maps (H, W) of images."""
        for predicted, expected in zip(output, batch, strict=True):
            counts = expected < self.num_classes
            index = expected[counts].long() * self.num_classes + predicted[counts]
            self.confusion += torch.bincount(index, minlength=self.num_classes**2).view_as(self.confusion)

    def compute(self, world: World | None = None) -> SegmentationMetrics:
        """Return the metrics over the images of all processes; NaN if no pixel counts."""
        confusion = self.confusion.clone()
        if world is not None and world.size > 1:
            dist.all_reduce(confusion)
        confusion = confusion.double()
        right, expected, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
        iou = 100 * right / (expected + predicted - right)
        return SegmentationMetrics(
            miou=iou.nanmean().item(),
            all_accuracy=100 * (right.sum() / confusion.sum()).item(),
            mean_accuracy=100 * (right / expected).nanmean().item(),
            iou=iou.float().cpu(),
            pixels=int(confusion.sum()),
        )
