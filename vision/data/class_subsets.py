"""Subsets of the classes of a model, such as ImageNet-1K for a model of ImageNet-22K, matched by WordNet ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from revnets.config.errors import option_error
from vision.errors import comparable


@dataclass(frozen=True, slots=True)
class Subset:
    """Selects the scores of some classes from the scores of all classes of a model.

    Attributes:
        index: For each class its index among the classes of the model, -1 if the model does not have it.
        unknown: Names of the classes that the model does not have.
    """

    index: Tensor
    unknown: tuple[str, ...]

    def __call__(self, scores: Tensor) -> Tensor:
        """Select scores (B, classes) from (B, all classes). An unknown class has the lowest score of its row."""
        index = self.index.to(scores.device)
        return torch.where(index >= 0, scores[:, index.clamp(min=0)], scores.amin(1, keepdim=True))


def are_numbers(classes: Sequence[str]) -> bool:
    """Whether all class names are numbers, as in a data set without class names."""
    return all(name.isdecimal() for name in classes)


def class_difference(known: Sequence[str], classes: Sequence[str]) -> str:
    """Describe the first class that differs between a model and data with as many classes; empty if none does.

    Numbers are not compared with names.
    """
    if are_numbers(known) == are_numbers(classes):
        for number, (ours, theirs) in enumerate(zip(map(comparable, classes), map(comparable, known), strict=False)):
            if ours != theirs:
                return f"class {number} is {ours} in the data, but {theirs} in the model"
    return ""


def subset(known: Sequence[str], classes: Sequence[str]) -> Subset:
    """Match classes by name.

    Args:
        known: All classes of a model, in the order of its scores.
        classes: Of the data. A thousand classes without names are assumed to be ImageNet-1K in its usual order.

    Raises:
        revnets.SpecError: If the model has none of them.
    """
    if len(classes) == 1000 and are_numbers(classes):
        classes = ImageNetInfo("imagenet-1k").label_names()
    places = {comparable(name): place for place, name in enumerate(known)}
    index = [places.get(comparable(name), -1) for name in classes]
    if max(index, default=-1) < 0:
        problem = (
            f"the model has none of the classes of the data, such as {classes[0]}; its classes are {known[0]}, ..."
        )
        hint = "Give the class directories of the data the names of the model's classes"
        raise option_error("--subset", problem, hint, code="class-mismatch")
    unknown = tuple(name for name, place in zip(classes, index, strict=True) if place < 0)
    return Subset(torch.tensor(index), unknown)


def imagenet_classes(count: int) -> tuple[str, ...]:
    """The WordNet ids of a variant of ImageNet in the order of its classes.

    The variants are timm's: 21841 classes of ImageNet-22K in alphabetical order; 21842 with those of ImageNet-1K first
    (Microsoft); 21843 (Google); 11221 (MIIL); 11821 (timm's 12K); 1000.

    Args:
        count: Number of classes, which identifies the variant.

    Raises:
        revnets.SpecError: If no variant has this number of classes.
    """
    name = infer_imagenet_subset({"num_classes": count})
    if name is None:
        problem = f"the weights have {count} classes without names, and no variant of ImageNet has this number"
        raise option_error("--subset", problem, "Give a checkpoint of revnets train", code="class-mismatch")
    return tuple(ImageNetInfo(name).label_names())
