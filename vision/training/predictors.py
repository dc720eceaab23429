"""What a trained model finds in a picture: classes of an image, objects with boxes and masks, or a map of classes."""

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
"""Larger pictures are reduced before objects are looked for: each of a hundred masks has as many bytes."""

MOST_SCORES = 2**28
"""Scores of all classes at all pixels of a picture; larger pictures are reduced before they are segmented."""


@dataclass(frozen=True)
class PicturePrediction:
    """What was found in a picture.

    Attributes:
        height, width: of the picture, after it was reduced if it was too large.
        text: on one line.
        picture: with all that was found drawn on it; None for the class of an image.
        annotations: of objects as files of COCO have them, without numbers of their own and of the image.
        scores: of the best classes by name, for the class of an image.
    """

    height: int
    width: int
    text: str
    picture: Image.Image | None = None
    annotations: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)


class Predictor:
    """A run whose model is asked about pictures.

    Attributes:
        draws: are there pictures of what is found?
        decoding: the mode that pictures are read in, and whether their EXIF orientation is applied.
    """

    draws = True
    decoding: tuple[str, Exif] = ("RGB", "apply")

    def __init__(self, run: LoadedRun, task: Task):
        self.run, self.task = run, task
        self.autocast = builders.build_autocast(run.config.amp, run.device)

    def __call__(self, picture: Image.Image) -> PicturePrediction:
        """What is in a picture of the mode that `decoding` names."""
        with torch.inference_mode(), self.autocast():
            return self.find(picture)

    def find(self, picture: Image.Image) -> PicturePrediction:
        raise NotImplementedError


class ImageClasses(Predictor):
    """The five best classes of an image."""

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
    """Boxes and perhaps masks.

    Args:
        least: score of objects that are drawn; all that the detector gives are among the annotations.
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
    """A class for every pixel."""

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
    """What asks the model of a run about pictures.

    Args:
        least: score of objects that are drawn.

    Raises:
        revnets.SpecError: its task gives nothing that could be shown.
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
    problem = f"the task {name} has no predictions that could be shown"
    raise run_error("task", problem, "Use vision.load_run in Python", code="conflicting-values")


def reduced(picture: Image.Image, most: int) -> Image.Image:
    """The picture with at most so many pixels."""
    if picture.width * picture.height <= most:
        return picture
    factor = (most / (picture.width * picture.height)) ** 0.5
    sides = max(1, int(picture.width * factor)), max(1, int(picture.height * factor))
    return picture.resize(sides, Image.Resampling.LANCZOS, reducing_gap=2.0)
