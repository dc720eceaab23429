"""The transformer of DINO: an encoder of feature maps, and a decoder that refines the boxes of queries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from vision.detection.dino_detr.deformable_attention import DeformableAttention
from vision.detection.dino_detr.padded_levels import FeatureSequence, sine_encoding
from vision.models.recomputation import recomputed

TEMPERATURE = 10000
"""Ratio of the longest to the shortest wavelength in the encoding of query boxes."""


class ScoredBoxes(NamedTuple):
    """Predictions for queries.

    Attributes:
        scores: Logits (B, Q, classes).
        boxes: (B, Q, 4), center, width and height as fractions of the image.
    """

    scores: Tensor
    boxes: Tensor


class DetectionHead(nn.Module):
    """Predicts class logits, and the offset of a box to its reference in logit space.

    Args:
        dim: Channels of the queries.
        num_classes: Number of classes without background.
    """

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.classes = nn.Linear(dim, num_classes)
        self.boxes = mlp(dim, dim, dim, 4)
        nn.init.constant_(self.classes.bias, -math.log(99))  # a probability of 1 %
        for parameter in self.boxes[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, queries: Tensor, references: Tensor, eps: float = 1e-5) -> ScoredBoxes:
        """Return the predictions for queries (B, Q, C) with references (B, Q, 4)."""
        return ScoredBoxes(self.classes(queries), self.moved(queries, references, eps))

    def moved(self, queries: Tensor, references: Tensor, eps: float) -> Tensor:
        """Return only the boxes (B, Q, 4)."""
        return (self.boxes(queries) + inverse_sigmoid(references, eps)).sigmoid()


class EncoderLayer(nn.Module):
    """Deformable self-attention of feature maps and a feed-forward network, with post-norm."""

    def __init__(self, dim: int, hidden: int, heads: int, levels: int):
        super().__init__()
        self.attention = DeformableAttention(dim, heads, levels)
        self.feedforward = mlp(dim, hidden, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(
        self,
        x: Tensor,
        encoding: Tensor,
        references: Tensor,
        sizes: Sequence[tuple[int, int]],
        padded: Tensor | None,
    ) -> Tensor:
        x = self.norms[0](x + self.attention(x + encoding, references, x, sizes, padded))
        return self.norms[1](x + self.feedforward(x))


class DecoderLayer(nn.Module):
    """Self-attention of queries, deformable attention to the features, and a feed-forward network, with post-norm."""

    def __init__(self, dim: int, hidden: int, heads: int, levels: int):
        super().__init__()
        self.among_queries = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.attention = DeformableAttention(dim, heads, levels)
        self.feedforward = mlp(dim, hidden, dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self,
        x: Tensor,
        encoding: Tensor,
        references: Tensor,
        features: Tensor,
        sizes: Sequence[tuple[int, int]],
        padded: Tensor | None,
        blocked: Tensor | None,
    ) -> Tensor:
        placed = x + encoding
        x = self.norms[0](x + self.among_queries(placed, placed, x, attn_mask=blocked, need_weights=False)[0])
        x = self.norms[1](x + self.attention(x + encoding, references, features, sizes, padded))
        return self.norms[2](x + self.feedforward(x))


class DeformableEncoder(nn.Module):
    """Encoder layers over the positions of all levels.

    Args:
        dim: Channels C.
        hidden: Hidden channels of the feed-forward networks.
        heads: Number of attention heads.
        levels: Number of feature maps.
        depth: Number of layers.
        checkpointed: Recompute layers in backward instead of storing their activations.
    """

    def __init__(self, dim: int, hidden: int, heads: int, levels: int, depth: int, checkpointed: bool = False):
        super().__init__()
        self.checkpointed = checkpointed
        self.layers = nn.ModuleList(EncoderLayer(dim, hidden, heads, levels) for _ in range(depth))

    def forward(self, sequence: FeatureSequence) -> FeatureSequence:
        """Return the sequence with encoded features."""
        x, references = sequence.features, sequence.scaled(sequence.centers)
        for layer in self.layers:
            x = _run(layer, self.checkpointed, x, sequence.encoding, references, sequence.sizes, sequence.padded)
        return sequence._replace(features=x)


class DeformableDecoder(nn.Module):
    """Decoder layers over queries. Each layer refines the boxes of the queries.

    The box that a layer predicts is computed from the previous layer's box with gradient, so its loss trains both
    layers ("look forward twice"). The references that layers attend with have no gradient.

    Args:
        dim, hidden, heads, levels, depth, checkpointed: as for `DeformableEncoder`.
    """

    def __init__(self, dim: int, hidden: int, heads: int, levels: int, depth: int, checkpointed: bool = False):
        super().__init__()
        self.dim, self.checkpointed = dim, checkpointed
        self.layers = nn.ModuleList(DecoderLayer(dim, hidden, heads, levels) for _ in range(depth))
        self.place = mlp(2 * dim, dim, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self,
        queries: Tensor,
        references: Tensor,
        sequence: FeatureSequence,
        heads: Sequence[DetectionHead],
        blocked: Tensor | None = None,
    ) -> list[ScoredBoxes]:
        """Return the predictions of every layer.

        Args:
            queries: (B, Q, C).
            references: Boxes (B, Q, 4) without gradient, as fractions of the image.
            sequence: Output of the encoder.
            heads: Detection head of each layer.
            blocked: (Q, Q), true where a query must not attend to another.
        """
        predictions: list[ScoredBoxes] = []
        before = references
        for number, (layer, head) in enumerate(zip(self.layers, heads, strict=True), start=1):
            encoding = self.place(sine_encoding(references[..., [1, 0, 2, 3]], self.dim // 2, TEMPERATURE))
            queries = _run(
                layer,
                self.checkpointed,
                queries,
                encoding,
                sequence.scaled(references),
                sequence.features,
                sequence.sizes,
                sequence.padded,
                blocked,
            )
            predictions.append(head(self.norm(queries), before))
            if number < len(self.layers):
                before = head.moved(queries, references, eps=1e-3)
                references = before.detach()
        return predictions


def mlp(*dims: int) -> nn.Sequential:
    """Build linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inside, outside in itertools.pairwise(dims):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def inverse_sigmoid(fractions: Tensor, eps: float) -> Tensor:
    """Return the logits of values in [0, 1], clamped by `eps` so that they are finite."""
    fractions = fractions.clamp(0, 1)
    return (fractions.clamp(min=eps) / (1 - fractions).clamp(min=eps)).log()


def _run(layer: nn.Module, checkpointed: bool, *args: object) -> Tensor:
    return recomputed(layer, *args) if checkpointed else layer(*args)
