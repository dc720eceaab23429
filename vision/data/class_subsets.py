"""Classes that are some of a model's: a model of ImageNet-22K evaluated on ImageNet-1K, matched by WordNet ids."""

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
    """Where the scores of some classes are among those of all that a model knows.

    Attributes:
        index: for every class its place among the model's, -1 if the model does not know it.
        unknown: names of the classes that the model does not know.
    """

    index: Tensor
    unknown: tuple[str, ...]

    def __call__(self, scores: Tensor) -> Tensor:
        """Scores (B, all classes) to those of the subset, (B, classes); unknown ones have the lowest of their row."""
        index = self.index.to(scores.device)
        return torch.where(index >= 0, scores[:, index.clamp(min=0)], scores.amin(1, keepdim=True))


def are_numbers(classes: Sequence[str]) -> bool:
    """Are the names of classes numbers alone? Those of a source without names are numbered from 0 on."""
    return all(name.isdecimal() for name in classes)


def class_difference(known: Sequence[str], classes: Sequence[str]) -> str:
    """The first class in which some data differ from a model of as many classes; empty if there is none.

    Numbers are not compared with names.
    """
    if are_numbers(known) == are_numbers(classes):
        for number, (ours, theirs) in enumerate(zip(map(comparable, classes), map(comparable, known), strict=False)):
            if ours != theirs:
                return f"class {number} is {ours} in the data, and {theirs} in the model"
    return ""


def subset(known: Sequence[str], classes: Sequence[str]) -> Subset:
    """Match classes by name.

    Args:
        known: all classes of a model, in the order of its scores.
        classes: of the data. A thousand without names are taken for ImageNet-1K in its usual order.

    Raises:
        revnets.SpecError: the model knows none of them.
    """
    if len(classes) == 1000 and are_numbers(classes):
        classes = ImageNetInfo("imagenet-1k").label_names()
    places = {comparable(name): place for place, name in enumerate(known)}
    index = [places.get(comparable(name), -1) for name in classes]
    if max(index, default=-1) < 0:
        problem = f"the model knows none of the classes of the data, such as {classes[0]}; it knows {known[0]}, ..."
        raise option_error(
            "--subset", problem, "Name the folders of the data as the model's classes", code="class-mismatch"
        )
    unknown = tuple(name for name, place in zip(classes, index, strict=True) if place < 0)
    return Subset(torch.tensor(index), unknown)


def imagenet_classes(count: int) -> tuple[str, ...]:
    """The WordNet ids of a variant of ImageNet in the order of its classes, found by their number.

    As timm has them: 21841 of ImageNet-22K in alphabetical order, as folders are read; 21842 with those of ImageNet-1K
    before the others (Microsoft); 21843 (Google); 11221 (MIIL); 11821 (timm's 12K); 1000.

    Raises:
        revnets.SpecError: no variant has so many.
    """
    name = infer_imagenet_subset({"num_classes": count})
    if name is None:
        problem = f"the weights have scores for {count} classes and no names of them, and no variant of ImageNet has so"
        raise option_error("--subset", f"{problem} many", "Give a checkpoint of revnets train", code="class-mismatch")
    return tuple(ImageNetInfo(name).label_names())
