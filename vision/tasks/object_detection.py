"""Object detection as a task of the trainer: boxes, and masks if the detector has them, validated by AP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from timm.task import TrainingTask
from torch import Tensor, nn

import vision.detection
from revnets.config.errors import nearest, show
from revnets.config.memory_budget import BudgetSpec
from vision.config.data import CocoConfig
from vision.config.learning import TimmModel
from vision.config.run import TrainConfig
from vision.detection.average_precision import AveragePrecisionEvaluator, DetectionMetrics
from vision.detection.coco_data import NOT_COUNTED, DetectionData, load_coco
from vision.detection.planned_step import OBJECTS, DetectionStep
from vision.distributed.context import World
from vision.errors import first_line, run_error
from vision.tasks.base import Batches, Task

Batch = tuple[list[Tensor], list[dict[str, Tensor]]]
"""Images (3, H, W) and targets: boxes, labels and masks for training, ids and file sizes for validation."""

DETECTORS = {"cascade_mask_rcnn": True, "htc": True, "dino": False}
"""Detectors of `vision.detection`, and whether they train on masks."""

MASKS_AT_ONCE = 16
"""Masks that are resized together. Those of a hundred objects of a large image would need a gigabyte."""


class ObjectDetection(Task):
    """Detection of objects with boxes, classes and optionally masks. `model: {timm: revcol_tiny, ...}` is the backbone.

    Args:
        config: Of the run, whose `data` is `coco`.
        detector: `cascade_mask_rcnn`, `htc` or `dino`.
        options: Of the detector; see `vision.detection`.
        copy_paste: Probability that objects of another image of the batch are pasted into an image. Needs masks.
        planned_objects: Objects per image in memory plans.
    """

    monitor, mode, label, unit, digits = "box_ap", "max", "box AP", "%", 2
    uses: ClassVar[frozenset[str]] = frozenset({"pretrained"})

    def __init__(
        self,
        config: TrainConfig,
        detector: str = "cascade_mask_rcnn",
        options: dict[str, Any] | None = None,
        copy_paste: float = 0.0,
        planned_objects: int = OBJECTS,
    ):
        super().__init__(config)
        if not isinstance(config.data, CocoConfig):
            raise run_error("data", "it has no boxes of objects", "Give name: coco", code="conflicting-values")
        if not isinstance(config.model, TimmModel):
            hint = "Name a RevCol, as in {timm: revcol_tiny}"
            raise run_error("model", "it is not a backbone for a detector", hint, code="invalid-component")
        self.detector, self.options, self.coco = detector, dict(options or {}), config.data
        if self.needs_masks() and not config.data.masks:
            problem = f"{detector} trains on masks"
            raise run_error("data.masks", problem, "Set it to true, or choose dino", code="conflicting-values")
        if not isinstance(copy_paste, (int, float)) or not 0 <= copy_paste <= 1:
            problem = f"{copy_paste!r} is not a probability"
            raise run_error("task.copy_paste", problem, "Give a number from 0 to 1", code="out-of-range")
        if copy_paste and not config.data.masks:
            raise run_error("task.copy_paste", "it needs masks", "Set data.masks: true", "conflicting-values")
        if type(planned_objects) is not int or planned_objects < 1:
            problem = f"{show(planned_objects)} is not a number of objects"
            raise run_error("task.planned_objects", problem, "Use an integer of at least 1", code="out-of-range")
        self.copy_paste, self.planned_objects = copy_paste, planned_objects

    def needs_masks(self) -> bool:
        """Whether the detector trains on masks.

        Raises:
            revnets.SpecError: If there is no such detector.
        """
        if self.detector not in DETECTORS:
            problem = f"unknown detector {self.detector!r}"
            raise run_error("task.detector", problem, nearest(self.detector, DETECTORS, "Give"), "unknown-choice")
        return DETECTORS[self.detector] and bool(self.options.get("masks", True))

    def stuff_classes(self) -> int | None:
        """Number of classes of the semantic maps that the detector trains on; None without maps."""
        return self.options.get("stuff_classes") if self.detector == "htc" else None

    def create_detector(self, backbone: str, num_classes: int, **options: Any) -> nn.Module:
        """Create the detector with a timm backbone. Its interface is that of torchvision's detectors."""
        create: Callable[..., nn.Module] = getattr(vision.detection, self.detector)
        return create(backbone, num_classes, **options)

    def load_data(self, notes: Path | None = None, world: World | None = None) -> DetectionData:
        return load_coco(self.coco, self.config.seed, notes, self.stuff_classes())

    def train_batches(self, data: DetectionData, world: World) -> Batches:
        """The training batches, with semantic maps if the detector uses them.

        Raises:
            revnets.SpecError: If maps are missing, or the detector does not use them.
        """
        has_maps, reads_maps = self.coco.stuff_maps is not None, self.stuff_classes() is not None
        if reads_maps and not has_maps:
            problem = "the detector has stuff_classes, but this key is missing"
            hint = "Give the directory of the semantic maps"
            raise run_error("data.stuff_maps", problem, hint, "conflicting-values")
        if has_maps and not reads_maps:
            hint = "Remove the key, or choose htc with the option stuff_classes"
            raise run_error("data.stuff_maps", "the detector uses no semantic maps", hint, "conflicting-values")
        return super().train_batches(data, world)

    def collate(self, samples: list[Any]) -> Batch:
        images, targets = zip(*samples, strict=True)
        return list(images), list(targets)

    def padding(self, sample: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
        """The same image with an id that does not count."""
        image, target = sample
        return image, {**target, "image_id": torch.tensor(NOT_COUNTED)}

    def metadata(self, data: DetectionData) -> dict[str, Any]:
        """Names and COCO category ids of the classes."""
        return {"classes": list(data.classes), "category_ids": list(data.category_ids)}

    def build_model(self, data: Any) -> nn.Module:
        """The detector in training mode.

        Raises:
            revnets.SpecError: If it cannot be built.
        """
        backbone = cast(TimmModel, self.config.model)
        options = {**backbone.options, **self.options}
        if self.config.memory is not None and not isinstance(self.config.memory, BudgetSpec):
            options["memory"] = self.config.memory
        try:
            model = self.create_detector(backbone.timm, len(data.classes), **options)
        except (TypeError, ValueError, RuntimeError) as error:
            remedy = "See docs/guides/detection.md"
            raise run_error("model", first_line(error), remedy, code="component-failed") from error
        return model.train()

    def planned(self, model: nn.Module) -> nn.Module:
        """Return the step with its losses, for images with `planned_objects` objects each.

        Raises:
            revnets.SpecError: If the detector is not one of `vision.detection`.
        """
        try:
            return DetectionStep(model, self.planned_objects)
        except ValueError as error:
            name = cast(TimmModel, self.config.model).timm
            hint = f"Set a memory mode, or plan the backbone: revnets plan {name}"
            raise run_error("task", first_line(error), hint, code="conflicting-values") from None

    def begin(self, model: nn.Module, data: DetectionData, world: World) -> str:
        """Load pretrained weights into the backbone, or those of a DINO detector into another one."""
        assert self.config.pretrained is not None
        from vision.detection.class_transfer import begin_detector

        return begin_detector(model, self.config.pretrained, data.classes, world)

    def training_task(self, model: nn.Module, data: DetectionData, device: torch.device) -> TrainingTask:
        """timm's task around the detector, with synchronized BatchNorm for several GPUs."""
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if processes > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return super().training_task(model, data, device)

    def augment(self, data: DetectionData) -> Callable[[Batch], Batch] | None:
        """Copy-paste augmentation within a batch, if the task has the option."""
        if not self.copy_paste:
            return None
        paste = vision.detection.CopyPaste(self.copy_paste)
        return lambda batch: paste(*batch)

    def loss(self, model: nn.Module, batch: Batch) -> Mapping[str, Tensor]:
        return model(*batch)

    def predict(self, model: nn.Module, batch: Batch) -> list[dict[str, Tensor]]:
        """Objects of every image in pixels of its file: `boxes` (N, 4), `labels`, `scores`, `masks` (N, H, W)."""
        images, targets = batch
        found = model(images)
        return [
            in_pixels_of_file(output, image.shape[-2:], target["size"].tolist())
            for output, image, target in zip(found, images, targets, strict=True)
        ]

    def evaluator(self, model: nn.Module, data: DetectionData, device: torch.device) -> DetectionEvaluator:
        return DetectionEvaluator(data, self.coco.masks)


def in_pixels_of_file(
    output: Mapping[str, Tensor], seen: tuple[int, int] | torch.Size, size: list[int]
) -> dict[str, Tensor]:
    """Rescale the output of a detector from a resized image to the image of the file.

    Args:
        output: `boxes`, `labels`, `scores`, and optionally `masks` (N, 1, H, W), probabilities.
        seen: Height and width of the resized image.
        size: Height and width of the image of the file.
    """
    height, width = size
    factors = torch.tensor([width / seen[1], height / seen[0]] * 2, dtype=torch.float64)
    boxes = output["boxes"].double() * factors.to(output["boxes"].device)
    limits = torch.tensor([width, height] * 2, dtype=torch.float64, device=boxes.device)
    found = {**output, "boxes": torch.minimum(boxes.clamp(min=0), limits)}
    if "masks" in output:
        resized = [
            F.interpolate(part.float(), size=size, mode="bilinear", align_corners=False)[:, 0] > 0.5
            for part in output["masks"].split(MASKS_AT_ONCE)
            if len(part)
        ]
        none = torch.zeros(0, height, width, dtype=torch.bool, device=boxes.device)
        found["masks"] = torch.cat(resized) if resized else none
    return found


class DetectionEvaluator:
    """Average precision over batches of the task."""

    def __init__(self, data: DetectionData, with_masks: bool):
        self.evaluator = AveragePrecisionEvaluator(data.annotations, with_masks)

    def update(self, output: list[dict[str, Tensor]], batch: Batch) -> None:
        self.evaluator.add(output, [int(target["image_id"]) for target in batch[1]])

    def compute(self, world: World) -> DetectionMetrics:
        return self.evaluator.compute(world)
