"""A RevCol with a feature pyramid as the backbone of a detector."""

from __future__ import annotations

from typing import Any

import timm
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from revnets.config.errors import ArgumentError, first_line
from revnets.config.memory_budget import BudgetSpec
from vision.models.architecture import RevCol
from vision.models.recomputation import recomputed

STRIDES = (4, 8, 16, 32)
"""Strides of the levels of a RevCol. The pyramid adds one with stride 64."""


def revcol_levels(backbone: str, finest: int = 0, **options: Any) -> nn.Module:
    """Build a RevCol whose forward pass returns a list of the levels of its last column.

    Args:
        backbone: A name of timm's registry, such as `revcol_tiny`.
        finest: Index of the finest level to return.
        options: Options of `timm.create_model`.

    Raises:
        ValueError: If the backbone does not exist, has other strides, has a memory budget, or rejects an option.
    """
    indices = tuple(range(finest, len(STRIDES)))
    try:
        body: Any = timm.create_model(backbone, features_only=True, out_indices=indices, **options)
    except (TypeError, RuntimeError) as error:
        raise ArgumentError(f"{backbone}: {first_line(error)}", "backbone", code="component-failed") from error
    revcol = next((module for module in body.modules() if isinstance(module, RevCol)), None)
    if revcol is None:
        raise ArgumentError(f"{backbone} is not a RevCol. Use one such as revcol_tiny", "backbone", code="no-columns")
    if tuple(body.feature_info.reduction()) != STRIDES[finest:]:
        found = body.feature_info.reduction()
        problem = f"{backbone} has levels of strides {found}, but a detector needs {list(STRIDES[finest:])}"
        raise ArgumentError(problem, "backbone", code="shape-mismatch")
    if isinstance(revcol.columns.budget, BudgetSpec):
        problem = (
            "a detector cannot plan a memory budget at its first call, because the sizes of later batches differ. Use "
            "a memory mode, then revnets.plan(vision.detection.DetectionStep(model), shape, budget=...).apply(model)"
        )
        raise ArgumentError(problem, "memory", code="conflicting-values")
    return body


class RevColPyramid(nn.Module):
    """A feature pyramid (Lin et al., "Feature Pyramid Networks", 2017) on the levels of a RevCol's last column.

    Args:
        backbone: A name of timm's registry, such as `revcol_tiny`.
        channels: Channels of each level of the pyramid.
        recompute: Recompute the activations of the pyramid in backward instead of storing them.
        options: Options of the backbone, such as `kernel_size`, `drop_path_rate` and `memory`.

    Raises:
        ValueError: If the backbone does not exist, has other strides, has a memory budget, or rejects an option.
    """

    def __init__(self, backbone: str, channels: int = 256, *, recompute: bool = False, **options: Any):
        super().__init__()
        self.body: Any = revcol_levels(backbone, **options)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels, LastLevelMaxPool())
        self.out_channels, self.recompute = channels, recompute

    @property
    def revcol(self) -> RevCol:
        """The timm model in the backbone."""
        return next(module for module in self.body.modules() if isinstance(module, RevCol))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map images (B, 3, H, W) to maps (B, channels, H / s, W / s) of strides s = 4, 8, 16, 32, 64, finest first."""
        levels = {str(index): level for index, level in enumerate(self.body(images))}
        return recomputed(self.fpn, levels) if self.recompute else self.fpn(levels)
