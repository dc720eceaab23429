"""Modules of transformers' Mask2Former that can recompute their activations and run in a simulated step."""

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
        recomputes: Whether activations are recomputed in backward instead of being stored.
    """

    recomputes = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_simulated(hidden_states):
            self.training = False  # in training mode the layer checks for infinite values
        return _run(self, super().forward, self.dropout > 0, hidden_states, *args, **kwargs)


class QueryLayer(original.Mask2FormerMaskedAttentionDecoderLayer):
    """A layer of the transformer decoder; `recomputes` as in `PixelLayer`."""

    recomputes = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, super().forward, self.dropout > 0, *args, **kwargs)


class MaskLosses(original.Mask2FormerLoss):
    """The losses; `recomputes` as in `PixelLayer`, for the sampled points of masks."""

    recomputes = False

    def loss_masks(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return _run(self, super().loss_masks, True, *args, **kwargs)


class MaskMatcher(original.Mask2FormerHungarianMatcher):
    """The assignment of queries to masks. In a simulated step it assigns the first queries."""

    def forward(
        self,
        masks_queries_logits: Tensor,
        class_queries_logits: Tensor,
        mask_labels: Any,
        class_labels: Any,
    ) -> Any:
        """Return the indices of matched queries and masks for each image."""
        if not is_simulated(masks_queries_logits):
            return super().forward(masks_queries_logits, class_queries_logits, mask_labels, class_labels)
        with torch.no_grad():
            pairs = zip(masks_queries_logits, mask_labels, strict=True)
            return [assigned_pairs(self._cost(logits, masks)) for logits, masks in pairs]

    def _cost(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Return the cost (Q, N) of queries and masks from sampled points of logits (Q, H, W) and masks (N, H, W)."""
        points = torch.rand(1, self.num_points, 2, device=logits.device)
        found, goals = (
            original.sample_point(part[:, None], points.repeat(len(part), 1, 1), align_corners=False).squeeze(1)
            for part in (logits, masks.to(logits))
        )
        entropy = original.pair_wise_sigmoid_cross_entropy_loss(found, goals)
        return entropy + original.pair_wise_dice_loss(found, goals)


class PositionEncoding(original.Mask2FormerSinePositionEmbedding):
    """The encoding of positions without transformers' cache, which a simulated step would fill with invalid tensors."""

    def forward(
        self, shape: torch.Size, device: torch.device | str, dtype: torch.dtype, mask: Tensor | None = None
    ) -> Tensor:
        build = getattr(self.build_sine_position_embedding, "__wrapped__", self.build_sine_position_embedding)
        options = (self.num_position_features, self.normalize, self.scale, self.temperature, mask)
        return build(shape, device, dtype, *options)


PARTS = {kind.__bases__[0]: kind for kind in (PixelLayer, QueryLayer, MaskLosses, MaskMatcher, PositionEncoding)}
"""Classes of transformers and their replacements."""


def adapt_parts(model: nn.Module, recompute: bool) -> None:
    """Replace the classes of the modules of a Mask2Former. Weights and their names do not change.

    Args:
        model: The model, which is modified.
        recompute: Whether layers and mask losses recompute activations in backward.
    """
    for module in model.modules():
        if type(module) in PARTS:
            module.__class__ = PARTS[type(module)]
            if hasattr(module, "recomputes"):
                module.recomputes = recompute  # type: ignore[assignment]


def _run(module: Any, function: Any, draws: bool, *args: Any, **kwargs: Any) -> Any:
    return recomputed(function, *args, draws=draws, **kwargs) if module.recomputes else function(*args, **kwargs)
