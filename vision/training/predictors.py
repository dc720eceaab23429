"""Predictions for images by the task of a run: classes, objects with boxes and masks, or a class for every pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from vision.data.decoding import Exif
from vision.errors import run_error
from vision.tasks import builders
from vision.tasks.base import Task
from vision.tasks.classification import Classification
from vision.training.loaded_run import LoadedRun

MOST_PIXELS = 2**23
"""Images with more pixels are reduced before detection: each of a hundred masks has one byte per pixel."""

MOST_SCORES = 2**28
"""Images with more scores (classes times pixels) are reduced before segmentation."""


@dataclass(frozen=True)
class PicturePrediction:
    """The prediction for one image.

    Attributes:
        height, width: of the image, after it was reduced if it was too large.
        text: One line.
        picture: Drawing of the prediction; None for the class of an image.
        annotations: Of objects in COCO's format, without ids of annotation and image.
        scores: Of the most likely classes by name, for the class of an image.
    """

    height: int
    width: int
    text: str
    picture: Image.Image | None = None
    annotations: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)


class Predictor:
    """Predicts with the model of a run.

    Args:
        run: With the model.
        task: Of the run.

    Attributes:
        draws: Whether predictions are drawn.
        decoding: Mode of the images, and whether their EXIF orientation is applied.
    """

    draws = True
    decoding: tuple[str, Exif] = ("RGB", "apply")

    def __init__(self, run: LoadedRun, task: Task):
        self.run, self.task = run, task
        self.autocast = builders.build_autocast(run.config.amp, run.device)

    def __call__(self, picture: Image.Image) -> PicturePrediction:
        """Predict for an image in the mode of `decoding`."""
        with torch.inference_mode(), self.autocast():
            return self.find(picture)

    def find(self, picture: Image.Image) -> PicturePrediction:
        raise NotImplementedError


class ImageClasses(Predictor):
    """Predicts the five most likely classes of an image."""

    draws = False

    def __init__(self, run: LoadedRun, task: Task):
        super().__init__(run, task)
        self.decoding = run.decoding

    def find(self, picture: Image.Image) -> PicturePrediction:
        scores = self.run.model(self.run.transform(picture)[None].to(self.run.device)).float().softmax(1)[0]
        best, places = scores.topk(min(5, len(self.run.classes)))
        found = {self.run.classes[place]: score for place, score in zip(places.tolist(), best.tolist(), strict=True)}
        text = ", ".join(f"{name} {100 * score:.1f} %" for name, score in found.items())
        return PicturePrediction(picture.height, picture.width, text, scores=found)


class Objects(Predictor):
    """Predicts boxes, and masks if the detector has them.

    Args:
        run: With the model.
        task: Of the run.
        least: Minimum score of drawn objects. Annotations include all objects.
    """

    def __init__(self, run: LoadedRun, task: Task, least: float):
        super().__init__(run, task)
        self.least = least

    def find(self, picture: Image.Image) -> PicturePrediction:
        import torchvision.transforms.v2.functional as TF

        from vision.detection.augmentation import resized
        from vision.detection.average_precision import detections_of
        from vision.tasks.object_detection import ObjectDetection
        from vision.training.drawing import draw_detections

        picture = reduced(picture, MOST_PIXELS)
        image = resized(TF.pil_to_tensor(picture), cast(ObjectDetection, self.task).coco).to(self.run.device)
        batch = [image], [{"size": torch.tensor([picture.height, picture.width])}]
        (found,) = self.task.predict(self.run.model, batch)
        detections = detections_of(0, found)
        numbers = self.run.category_ids or tuple(range(1, len(self.run.classes) + 1))
        boxes = detections.results(numbers, 0, "bbox")
        masks: Sequence[dict[str, Any]] = detections.masks or [{}] * len(boxes)
        annotations = [
            {
                "category_id": row["category_id"],
                "bbox": [round(value, 2) for value in row["bbox"]],
                "area": round(row["bbox"][2] * row["bbox"][3], 2),
                "iscrowd": 0,
                "score": round(row["score"], 5),
                **({"segmentation": mask} if mask else {}),
            }
            for row, mask in zip(boxes, masks, strict=True)
        ]
        labels = found["labels"][found["scores"] >= self.least].tolist()
        names = [self.run.classes[label - 1] for label in labels]
        text = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "nothing"
        drawn = draw_detections(picture, found, self.run.classes, self.least)
        return PicturePrediction(picture.height, picture.width, text, drawn, annotations)


class ClassMap(Predictor):
    """Predicts a class for every pixel."""

    def find(self, picture: Image.Image) -> PicturePrediction:
        import torchvision.transforms.v2.functional as TF

        from vision.segmentation.semantic_maps import normalized
        from vision.tasks.semantic_segmentation import SemanticSegmentation
        from vision.training.drawing import draw_classes

        picture = reduced(picture, MOST_SCORES // len(self.run.classes))
        image = normalized(TF.pil_to_tensor(picture), cast(SemanticSegmentation, self.task).maps)
        (numbers,) = cast(list[Tensor], self.task.predict(self.run.model, ([image.to(self.run.device)], [])))
        counts = torch.bincount(numbers.flatten(), minlength=len(self.run.classes)).tolist()
        order = sorted((number for number in range(len(counts)) if counts[number]), key=lambda number: -counts[number])
        shares = [f"{self.run.classes[number]} {100 * counts[number] / numbers.numel():.1f} %" for number in order[:5]]
        drawn = draw_classes(picture, numbers, self.run.classes)
        return PicturePrediction(picture.height, picture.width, ", ".join(shares), drawn)


def predictor_of(run: LoadedRun, least: float = 0.5) -> Predictor:
    """The predictor for the task of a run.

    Args:
        run: With the model.
        least: Minimum score of drawn objects.

    Raises:
        revnets.SpecError: If the task has no predictor.
    """
    task = builders.create_task(run.config)
    if isinstance(task, Classification):
        return ImageClasses(run, task)
    kinds = [kind.__name__ for kind in type(task).__mro__]  # without an import of the other tasks
    if "ObjectDetection" in kinds:
        return Objects(run, task, least)
    if "SemanticSegmentation" in kinds:
        return ClassMap(run, task)
    name, _ = run.config.task_and_options
    problem = f"`revnets predict` does not support the task {name}"
    raise run_error("task", problem, "Use vision.load_run in Python", code="conflicting-values")


def reduced(picture: Image.Image, most: int) -> Image.Image:
    """Reduce an image to at most this many pixels."""
    if picture.width * picture.height <= most:
        return picture
    factor = (most / (picture.width * picture.height)) ** 0.5
    sides = max(1, int(picture.width * factor)), max(1, int(picture.height * factor))
    return picture.resize(sides, Image.Resampling.LANCZOS, reducing_gap=2.0)
