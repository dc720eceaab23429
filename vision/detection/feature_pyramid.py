"""A RevCol with a feature pyramid, as the backbone of a detector."""

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
"""Strides of the levels of a RevCol. The pyramid has one more, 64."""


def revcol_levels(backbone: str, finest: int = 0, **options: Any) -> nn.Module:
    """A RevCol whose forward returns the levels of its last column from `finest` on: images to a list of maps.

    Raises:
        ValueError: the backbone does not exist, has other levels, has a memory budget or refuses its options.
    """
    indices = tuple(range(finest, len(STRIDES)))
    try:
        body: Any = timm.create_model(backbone, features_only=True, out_indices=indices, **options)
    except (TypeError, RuntimeError) as error:
        raise ArgumentError(f"{backbone}: {first_line(error)}", "backbone", code="component-failed") from error
    revcol = next((module for module in body.modules() if isinstance(module, RevCol)), None)
    if revcol is None:
        raise ArgumentError(f"{backbone} is no RevCol. Name one", "backbone", code="no-columns")
    if tuple(body.feature_info.reduction()) != STRIDES[finest:]:
        found = body.feature_info.reduction()
        problem = f"{backbone} has levels of strides {found}, and a detector needs {list(STRIDES[finest:])}"
        raise ArgumentError(problem, "backbone", code="shape-mismatch")
    if isinstance(revcol.columns.budget, BudgetSpec):
        problem = (
            "a detector cannot plan its memory budget at its first call, because images and boxes vary. Give a memory "
            "mode, and apply revnets.plan(vision.detection.DetectionStep(model), input_shape, budget=...)"
        )
        raise ArgumentError(problem, "memory", code="conflicting-values")
    return body


class RevColPyramid(nn.Module):
    """The levels of a RevCol's last column, merged from the top down (Lin et al., "Feature Pyramid Networks", 2017).

    Args:
        backbone: a name of timm's registry, such as `revcol_tiny`.
        channels: of each level of the pyramid.
        recompute: keep no activations of the pyramid, and compute them again in backward.
        options: of the backbone, such as `kernel_size`, `drop_path_rate` and `memory`.

    Raises:
        ValueError: the backbone does not exist, has other levels, has a memory budget or refuses its options.
    """

    def __init__(self, backbone: str, channels: int = 256, *, recompute: bool = False, **options: Any):
        super().__init__()
        self.body: Any = revcol_levels(backbone, **options)
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), channels, LastLevelMaxPool())
        self.out_channels, self.recompute = channels, recompute

    @property
    def revcol(self) -> RevCol:
        """The model of timm inside of the backbone."""
        return next(module for module in self.body.modules() if isinstance(module, RevCol))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to maps (B, channels, H / s, W / s) of strides s = 4, 8, 16, 32 and 64, finest first."""
        levels = {str(index): level for index, level in enumerate(self.body(images))}
        return recomputed(self.fpn, levels) if self.recompute else self.fpn(levels)
