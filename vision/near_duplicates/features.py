"""Features of a teacher, and pairs of images with similar features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vision.labeling.teacher import Teacher
from vision.near_duplicates.pictures import Pictures

BATCH = 64

BLOCK = 2**24
"""Similarities that are in memory at once if faiss is not installed."""


def has_features(teacher: Teacher) -> bool:
    """Whether the model of a teacher returns features through timm's interface."""
    return hasattr(teacher.model, "forward_features") and hasattr(teacher.model, "forward_head")


class TeacherFeatures:
    """Input of a teacher's classifier, normalized to length 1: the mean over an image and its mirror image."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features of images, (images, channels), float32 on the CPU."""
        found = []
        for start in range(0, len(pictures), BATCH):
            images = torch.stack([self.teacher.transform(picture) for picture in pictures[start : start + BATCH]])
            images = images.to(self.teacher.device)
            found.append(F.normalize(self._of(images) + self._of(images.flip(-1)), dim=1).cpu())
        return torch.cat(found) if found else torch.zeros(0, 1)

    def of_keys(self, pictures: Pictures, keys: Sequence[str]) -> np.ndarray:
        """Features of images by their keys, (images, channels); zeros for unreadable images."""
        found: list[Tensor] = []
        for start in range(0, len(keys), BATCH):
            read = [pictures.read(key) for key in keys[start : start + BATCH]]
            features = self([picture or Image.new("RGB", (8, 8)) for picture in read])
            found.append(features * torch.tensor([[picture is not None] for picture in read]))
        return torch.cat(found).numpy() if found else np.zeros((0, 1), np.float32)

    def _of(self, images: Tensor) -> Tensor:
        model: Any = self.teacher.model
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        return F.normalize(features.float().flatten(1), dim=1)


def similar_features(
    features: np.ndarray, others: np.ndarray, count: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Find the nearest neighbors of each image in another set by the cosine of features, with faiss if it is installed.

    Args:
        features, others: (N, channels) and (M, channels), float32, of length 1.
        count: Neighbors of each image.

    Yields:
        Indices of images, indices of neighbors and cosines, each (pairs,), block by block.
    """
    count = min(count, len(others))
    step = max(1, BLOCK // max(1, len(others)))
    try:
        import faiss
    except ImportError:
        index = None
    else:
        index = faiss.IndexFlatIP(others.shape[1])
        index.add(np.ascontiguousarray(others, np.float32))
    for start in range(0, len(features), step):
        block = np.ascontiguousarray(features[start : start + step], np.float32)
        if index is None:
            values, places = (
                found.numpy() for found in (torch.from_numpy(block) @ torch.from_numpy(others).T).topk(count)
            )
        else:
            values, places = index.search(block, count)
        yield np.repeat(np.arange(start, start + len(block)), count), places.ravel(), values.ravel()
