"""The training step of a detector as a function of images, for memory plans."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revnets.config.errors import ArgumentError
from vision.detection.detector_options import require_counts
from vision.detection.dino_detr.dino_detector import DINO
from vision.detection.rcnn.cascade_rcnn import RegionDetector
from vision.detection.training_targets import Target
from vision.models.simulated_values import is_simulated, use_local_statistics

OBJECTS = 100
"""Default number of objects per image in memory plans."""


class DetectionStep(nn.Module):
    """The losses of a detector for images that all have the same number of objects.

    `revnets.plan(DetectionStep(model), (2, 3, 1333, 1333))` simulates a training step. The simulation assumes the
    largest number of proposals, sampled boxes and masks that the detector allows, so the plan is an upper bound for
    batches with at most that many objects per image.

    Args:
        detector: A model of `cascade_mask_rcnn`, `htc` or `dino`.
        objects: Number of objects of each image.

    Raises:
        ValueError: If the detector is another model, or `objects` is not an integer of at least 1.
    """

    def __init__(self, detector: nn.Module, objects: int = OBJECTS):
        super().__init__()
        require_counts(1, objects=objects)
        if not isinstance(detector, RegionDetector | DINO):
            problem = f"{type(detector).__name__} is not a detector of vision.detection, so its step cannot be planned"
            raise ArgumentError(problem, "detector", code="invalid-component")
        self.detector, self.objects = detector, objects

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the losses of images (B, 3, H, W)."""
        if is_simulated(images):
            use_local_statistics(self.detector)
        return self.detector(list(images), [self._target(image) for image in images])

    def _target(self, image: Tensor) -> Target:
        """Return boxes with a quarter of the image's sides, spread over it, and other keys that the detector reads."""
        height, width = image.shape[-2:]
        corners = torch.arange(self.objects, device=image.device) / self.objects * 0.75
        left, top = corners * width, (corners * 7 % 0.75) * height
        target = {
            "boxes": torch.stack([left, top, left + width / 4, top + height / 4], 1),
            "labels": torch.ones(self.objects, dtype=torch.long, device=image.device),
        }
        heads = getattr(self.detector, "roi_heads", None)
        if len(getattr(heads, "mask_heads", ())):
            target["masks"] = torch.ones(self.objects, height, width, dtype=torch.uint8, device=image.device)
        if getattr(heads, "semantic", None) is not None:
            target["semantic_map"] = torch.zeros(height, width, dtype=torch.uint8, device=image.device)
        return target
