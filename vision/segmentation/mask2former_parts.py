"""Modules of transformers' Mask2Former that can recompute their activations, and run in the simulated step of a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mask2former import modeling_mask2former as original

from vision.models.recomputation import recomputed
from vision.models.simulated_values import assigned_pairs, is_simulated


class PixelLayer(original.Mask2FormerPixelDecoderEncoderLayer):
    """A layer of the pixel decoder.

    Attributes:
        recomputes: keep no activations, and compute them again in backward.
    """

    recomputes = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_simulated(hidden_states):
            self.training = False  # in training mode the layer reads values, to clamp infinite ones
        return _run(self, super().forward, self.dropout > 0, hidden_states, *args, **kwargs)


class QueryLayer(original.Mask2FormerMaskedAttentionDecoderLayer):
    """A layer of the transformer decoder; `recomputes` is as of `PixelLayer`."""

    recomputes = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, super().forward, self.dropout > 0, *args, **kwargs)


class MaskLosses(original.Mask2FormerLoss):
    """The losses; with `recomputes`, backward samples and compares the same points of masks again."""

    recomputes = False

    def loss_masks(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return _run(self, super().loss_masks, True, *args, **kwargs)


class MaskMatcher(original.Mask2FormerHungarianMatcher):
    """The assignment of queries to masks; in a simulated step to the first queries."""

    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: list[Tensor],
        class_labels: list[Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Indices of the queries and of the masks that belong together, for each image."""
        if not is_simulated(masks_queries_logits):
            return super().forward(masks_queries_logits, class_queries_logits, mask_labels, class_labels)
        with torch.no_grad():
            pairs = zip(masks_queries_logits, mask_labels, strict=True)
            return [assigned_pairs(self._cost(logits, masks)) for logits, masks in pairs]

    def _cost(self, logits: Tensor, masks: Tensor) -> Tensor:
        """The cost of queries and masks (Q, N), from points of logits (Q, H, W) and masks (N, H, W)."""
        points = torch.rand(1, self.num_points, 2, device=logits.device)
        found, goals = (
            original.sample_point(part[:, None], points.repeat(len(part), 1, 1), align_corners=False).squeeze(1)
            for part in (logits, masks.to(logits))
        )
        entropy = original.pair_wise_sigmoid_cross_entropy_loss(found, goals)
        return entropy + original.pair_wise_dice_loss(found, goals)


class PositionEncoding(original.Mask2FormerSinePositionEmbedding):
    """The encoding of positions without a cache, which would hand tensors of a simulated step to a real one."""

    def forward(
        self, shape: torch.Size, device: torch.device | str, dtype: torch.dtype, mask: Tensor | None = None
    ) -> Tensor:
        build: Any = self.build_sine_position_embedding
        options = (self.num_position_features, self.normalize, self.scale, self.temperature, mask)
        return build.__wrapped__(shape, device, dtype, *options)


PARTS = {kind.__bases__[0]: kind for kind in (PixelLayer, QueryLayer, MaskLosses, MaskMatcher, PositionEncoding)}
"""The classes of transformers, and those that take their place."""


def adapt_parts(model: nn.Module, recompute: bool) -> None:
    """Give the modules of a Mask2Former the classes of this file. Weights and their names stay as they are.

    Args:
        recompute: layers and mask losses keep no activations.
    """
    for module in model.modules():
        if type(module) in PARTS:
            module.__class__ = PARTS[type(module)]
            if hasattr(module, "recomputes"):
                module.recomputes = recompute  # type: ignore[assignment]


def _run(module: Any, function: Any, draws: bool, *args: Any, **kwargs: Any) -> Any:
    return recomputed(function, *args, draws=draws, **kwargs) if module.recomputes else function(*args, **kwargs)
