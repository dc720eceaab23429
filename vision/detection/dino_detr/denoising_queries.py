"""Contrastive denoising: queries from noisy objects that learn to recover the objects or to reject the noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from vision.detection.dino_detr.deformable_transformer import inverse_sigmoid
from vision.detection.dino_detr.hungarian_matching import Pairs
from vision.detection.dino_detr.target_boxes import TargetBoxes


class DenoisingQueries(NamedTuple):
    """Queries for a batch: G groups of N positive and N negative ones, D = 2 G N in all.

    Attributes:
        contents: (B, D, C), embeddings of labels, some of them wrong; zeros where an image has fewer than N objects.
        references: (B, D, 4), noisy boxes.
        blocked: (D + Q, D + Q), true where a query must not attend to another: ordinary queries do not attend to noisy
            copies, and groups do not attend to each other.
        pairs: The positive queries and their objects, for each image.
        groups: Number G of groups.
    """

    contents: Tensor
    references: Tensor
    blocked: Tensor
    pairs: list[Pairs]
    groups: int


class ContrastiveDenoising(nn.Module):
    """Noisy copies of the objects of training images.

    The corners of a positive copy are shifted by less than half a side, those of a negative copy by half a side to a
    whole side (times `box_noise`). The number of groups is chosen so that there are about `copies` positive copies.

    Args:
        num_classes: Number of classes without background.
        dim: Channels C.
        queries: Maximum number of ordinary queries. Only that many objects of an image are copied.
        copies: Positive copies per image, 100 in the paper.
        label_noise: Twice the probability that a copy gets a random label.
        box_noise: Scale of the shift of corners.
    """

    def __init__(
        self, num_classes: int, dim: int, queries: int, copies: int, label_noise: float = 0.5, box_noise: float = 1.0
    ):
        super().__init__()
        self.num_classes, self.queries, self.copies = num_classes, queries, copies
        self.label_noise, self.box_noise = label_noise, box_noise
        self.labels = nn.Embedding(num_classes, dim)

    def forward(self, objects: Sequence[TargetBoxes], queries: int) -> DenoisingQueries:
        """Return noisy copies of objects, to be placed in front of `queries` ordinary queries."""
        counts = [min(len(item.labels), self.queries) for item in objects]
        most = max(counts)
        groups = max(1, self.copies // max(1, most))
        shape = (len(objects), groups, 2, most)
        labels, boxes, real = self._repeated(objects, counts, shape)
        contents = self.labels(self._noisy_labels(labels)) * real[..., None]
        references = torch.where(real[..., None], self._noisy_boxes(boxes), boxes)
        return DenoisingQueries(
            contents=contents.flatten(1, 3),
            references=references.flatten(1, 3),
            blocked=_blocked(groups, 2 * most, queries, labels.device),
            pairs=[_positives(groups, most, count, labels.device) for count in counts],
            groups=groups,
        )

    @staticmethod
    def _repeated(
        objects: Sequence[TargetBoxes], counts: Sequence[int], shape: tuple[int, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels and boxes of all copies, and a mask that is false for padding."""
        first = objects[0].boxes
        labels = torch.zeros(shape, dtype=torch.long, device=first.device)
        boxes = torch.full((*shape, 4), 0.5, device=first.device)
        real = torch.zeros(shape, dtype=torch.bool, device=first.device)
        for image, (item, count) in enumerate(zip(objects, counts, strict=True)):
            labels[image, ..., :count] = item.labels[:count]
            boxes[image, ..., :count, :] = item.boxes[:count]
            real[image, ..., :count] = True
        return labels, boxes, real

    def _noisy_labels(self, labels: Tensor) -> Tensor:
        is_wrong = torch.rand_like(labels, dtype=torch.float32) < self.label_noise / 2
        return torch.where(is_wrong, torch.randint_like(labels, self.num_classes), labels)

    def _noisy_boxes(self, boxes: Tensor) -> Tensor:
        """Shift the corners of boxes (B, G, 2, N, 4) within the image; index 1 of axis 2 has the negative copies."""
        corners = box_convert(boxes, "cxcywh", "xyxy")
        sides = boxes[..., 2:].repeat(1, 1, 1, 1, 2)
        signs = torch.randint_like(corners, 0, 2) * 2 - 1
        shifts = torch.rand_like(corners)
        shifts[:, :, 1] += 1
        noisy = box_convert((corners + signs * shifts * sides * self.box_noise / 2).clamp(0, 1), "xyxy", "cxcywh")
        return inverse_sigmoid(noisy, eps=1e-3).sigmoid()


def _positives(groups: int, most: int, count: int, device: torch.device) -> Pairs:
    objects = torch.arange(count, device=device)
    first = torch.arange(groups, device=device)[:, None] * 2 * most
    return Pairs((first + objects).flatten(), objects.repeat(groups))


def _blocked(groups: int, size: int, queries: int, device: torch.device) -> Tensor:
    total = groups * size
    group = torch.arange(total, device=device) // max(1, size)
    blocked = torch.zeros(total + queries, total + queries, dtype=torch.bool, device=device)
    blocked[:total, :total] = group[:, None] != group
    blocked[total:, :total] = True
    return blocked
