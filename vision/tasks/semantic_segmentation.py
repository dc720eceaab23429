"""Semantic segmentation as a task of the trainer: UperNet or Mask2Former, validated by mean IoU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from revnets.config.errors import show
from revnets.config.memory_budget import BudgetSpec
from vision.config.data import SemanticMapsConfig
from vision.config.learning import TimmModel
from vision.config.run import TrainConfig
from vision.distributed.context import World
from vision.errors import run_error
from vision.models.simulated_values import is_simulated, use_local_statistics
from vision.segmentation import IoUEvaluator, mask2former, upernet
from vision.segmentation.inference import predicted_classes
from vision.segmentation.metrics import SegmentationMetrics
from vision.segmentation.segmenters import IGNORED, RevColSegmenter
from vision.segmentation.semantic_maps import SegmentationData, load_semantic_maps
from vision.tasks.base import Task

Batch = tuple[list[Tensor], list[Tensor]]
"""Images (C, H, W) and semantic maps (H, W), whose sizes may differ in validation."""


class SemanticSegmentation(Task):
    """Semantic segmentation. `model: {timm: revcol_tiny, ...}` is the backbone.

    Args:
        config: Of the run, whose `data` is `semantic_maps`.
        head: `upernet` or `mask2former`.
        options: Of the head, such as `channels: 512`; see `vision.segmentation`.
        planned_classes: Classes per image in memory plans, by default all. Mask2Former has a mask for each.
    """

    monitor, mode, label, unit, digits = "miou", "max", "mIoU", "%", 2
    uses: ClassVar[frozenset[str]] = frozenset({"pretrained"})

    def __init__(
        self,
        config: TrainConfig,
        head: Literal["upernet", "mask2former"] = "upernet",
        options: dict[str, Any] | None = None,
        planned_classes: int | None = None,
    ):
        super().__init__(config)
        if head not in ("upernet", "mask2former"):
            raise run_error("task.head", f"unknown head {head!r}", "Give upernet or mask2former", "unknown-choice")
        if not isinstance(config.data, SemanticMapsConfig):
            raise run_error("data", "it has no semantic maps", "Give name: semantic_maps", code="conflicting-values")
        if not isinstance(config.model, TimmModel):
            hint = "Name a RevCol, as in {timm: revcol_tiny}"
            raise run_error("model", "it is not a backbone for a segmenter", hint, code="invalid-component")
        if planned_classes is not None and (type(planned_classes) is not int or planned_classes < 1):
            problem = f"{show(planned_classes)} is not a number of classes"
            raise run_error("task.planned_classes", problem, "Use an integer of at least 1", code="out-of-range")
        self.head, self.options, self.maps = head, dict(options or {}), config.data
        self.planned_classes = planned_classes

    def load_data(self, notes: Path | None = None, world: World | None = None) -> SegmentationData:
        return load_semantic_maps(self.maps, self.config.seed, notes)

    def collate(self, samples: list[Any]) -> Batch:
        images, maps = zip(*samples, strict=True)
        return list(images), list(maps)

    def padding(self, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The same image with a map in which no pixel counts."""
        return sample[0], torch.full_like(sample[1], IGNORED)

    def metadata(self, data: SegmentationData) -> dict[str, Any]:
        """Names of the classes."""
        return {"classes": list(data.classes)}

    def build_model(self, data: SegmentationData) -> nn.Module:
        """The segmenter in training mode.

        Raises:
            revnets.SpecError: If it cannot be built.
        """
        backbone = cast(TimmModel, self.config.model)
        options = {**backbone.options, **self.options}
        if self.config.memory is not None and not isinstance(self.config.memory, BudgetSpec):
            options["memory"] = self.config.memory
        try:
            build = upernet if self.head == "upernet" else mask2former
            model = build(backbone.timm, len(data.classes), **options)
        except (TypeError, ValueError) as error:
            raise run_error("model", str(error), "See docs/guides/segmentation.md", code="component-failed") from error
        return model.train()

    def planned(self, model: nn.Module) -> nn.Module:
        """The step with its loss, because scores of all classes at image size need more memory than the backbone."""
        return SegmentationStep(cast(RevColSegmenter, model), self.planned_classes)

    def begin(self, model: nn.Module, data: SegmentationData, world: World) -> str:
        """Load pretrained weights into the backbone."""
        assert self.config.pretrained is not None
        from vision.weights import finetune

        return finetune.begin(cast(RevColSegmenter, model).revcol, self.config.pretrained, (), world)

    def training_task(self, model: nn.Module, data: SegmentationData, device: torch.device) -> TrainingTask:
        """timm's task around the segmenter, with synchronized BatchNorm for several GPUs.

        Raises:
            revnets.SpecError: BatchNorm would see a single image.
        """
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        if processes > 1 and device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        elif self.config.batch_size == 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
            problem = "BatchNorm of the pyramid pooling needs more than one image per process"
            raise run_error("batch_size", problem, "Give at least 2", code="out-of-range")
        return super().training_task(model, data, device)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        targets = cast(RevColSegmenter, unwrap_model(model)).targets(torch.stack(batch[1]))
        return model(pixel_values=torch.stack(batch[0]), **targets).loss.squeeze()

    def predict(self, model: nn.Module, batch: Batch) -> list[Tensor]:
        """The class of every pixel of every image, at the size of its file, (H, W) each."""
        data = self.maps
        return [
            predicted_classes(
                cast(RevColSegmenter, model).semantic_logits,
                image,
                short_side=data.short_side,
                long_side=data.long_side,
                window=data.window,
                stride=data.stride,
                scales=data.scales,
                flip=data.flip,
            )
            for image in batch[0]
        ]

    def evaluator(self, model: nn.Module, data: SegmentationData, device: torch.device) -> MapEvaluator:
        return MapEvaluator(len(data.classes), device)


class SegmentationStep(nn.Module):
    """The loss of a segmenter as a function of images (B, C, H, W), for memory plans.

    Args:
        segmenter: UperNet or Mask2Former.
        classes: Classes per image, by default all. Mask2Former has a mask for each.
    """

    def __init__(self, segmenter: RevColSegmenter, classes: int | None = None):
        super().__init__()
        self.segmenter = segmenter
        known = int(cast(Any, segmenter).config.num_labels)
        self.classes = known if classes is None else min(classes, known)

    def forward(self, images: Tensor) -> Tensor:
        if is_simulated(images):
            use_local_statistics(self.segmenter)
        pixels = torch.arange(images[:, 0].numel(), device=images.device).view_as(images[:, 0])
        return self.segmenter.semantic_loss(images, pixels % self.classes, self.classes)


class MapEvaluator:
    """Mean IoU over batches of the task."""

    def __init__(self, num_classes: int, device: torch.device):
        self.evaluator = IoUEvaluator(num_classes, device)

    def update(self, output: list[Tensor], batch: Batch) -> None:
        self.evaluator.update(output, batch[1])

    def compute(self, world: World) -> SegmentationMetrics:
        return self.evaluator.compute(world)
