"""Features of a teacher, and images that are near by them: as a further opinion on suspects, or instead of labels."""

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
"""Similarities in memory at once where faiss is not installed."""


def has_features(teacher: Teacher) -> bool:
    """Does its model tell features, as those of timm do?"""
    return hasattr(teacher.model, "forward_features") and hasattr(teacher.model, "forward_head")


class TeacherFeatures:
    """What a teacher computes before its classifier, of length 1: the mean over a picture and the mirrored one."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features of pictures, (pictures, channels), float32 on the CPU."""
        found = []
        for start in range(0, len(pictures), BATCH):
            images = torch.stack([self.teacher.transform(picture) for picture in pictures[start : start + BATCH]])
            images = images.to(self.teacher.device)
            found.append(F.normalize(self._of(images) + self._of(images.flip(-1)), dim=1).cpu())
        return torch.cat(found) if found else torch.zeros(0, 1)

    def of_keys(self, pictures: Pictures, keys: Sequence[str]) -> np.ndarray:
        """Features of images by their keys, (images, channels); zeros for those that cannot be read."""
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
    """The nearest others of each image by the cosine of their features, with faiss if it is installed.

    Args:
        features, others: (N, channels) and (M, channels), float32, of length 1.
        count: of the others for each.

    Yields:
        numbers of images, numbers of others and cosines, each (pairs,), block by block.
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
