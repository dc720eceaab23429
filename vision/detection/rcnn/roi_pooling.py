"""Pooling of the features of boxes from a pyramid by RoIAlign (He et al., "Mask R-CNN", 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from vision.detection.feature_pyramid import STRIDES
from vision.models.simulated_values import rows_where

FINEST_SCALE = 56
"""Boxes smaller than twice this side, in pixels, are pooled from the finest level. The next levels double the limit."""
SEMANTIC_SIZE = 14


class RoIPool(nn.Module):
    """RoIAlign with half-pixel centers, each box from the level of its size, as in mmdetection's `SingleRoIExtractor`.

    Args:
        size: Side of the pooled maps.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, levels: Sequence[Tensor], boxes: list[Tensor], semantic: Tensor | None = None) -> Tensor:
        """Pool the features of boxes to (sum of n, channels, size, size).

        Args:
            levels: Maps (B, channels, H / stride, W / stride) of strides 4 to 32.
            boxes: (n, 4) of each image, in pixels.
            semantic: Map of stride 8 whose pooled values are added.
        """
        rois = indexed_boxes(boxes)
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        level = (side / FINEST_SCALE + 1e-6).log2().floor().clamp(0, len(STRIDES) - 1)
        pooled = levels[0].new_zeros(len(rois), levels[0].shape[1], self.size, self.size)
        for index, stride in enumerate(STRIDES):
            most = len(rois) if index == len(STRIDES) - 1 else 0  # backward needs the most memory for the last level
            rows = rows_where(level == index, most)
            values = roi_align(levels[index], rois[rows], self.size, 1 / stride, 0, aligned=True)
            pooled = pooled.index_put((rows,), values.to(pooled.dtype))
        if semantic is not None:
            values = roi_align(semantic, rois, SEMANTIC_SIZE, 1 / STRIDES[1], 0, aligned=True)
            pooled = pooled + F.adaptive_avg_pool2d(values, self.size)
        return pooled


def indexed_boxes(boxes: list[Tensor]) -> Tensor:
    """Concatenate the boxes (n, 4) of each image to (sum of n, 5), with the index of the image first."""
    return torch.cat([F.pad(places, (1, 0), value=index) for index, places in enumerate(boxes)])
