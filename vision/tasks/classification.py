"""Image classification: timm's task and losses, mixup, and top-1 and top-5 accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.task import ClassificationTask, TrainingTask
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn

from vision.config.learning import TimmModel
from vision.data.dataset import ImageData
from vision.data.samplers import without_class
from vision.distributed.context import World
from vision.errors import run_error
from vision.tasks.base import Task
from vision.tasks.builders import create_model, fake_output

CONFUSIBLE = 1000
"""Most classes for which a confusion matrix is computed. For 21841 classes it would need 4 GB."""


class Classification(Task):
    """Classification of images. A batch is images (B, C, H, W) and class numbers (B,), where -1 does not count."""

    monitor, mode, label, unit, digits = "top1", "max", "top-1", "%", 2
    uses = frozenset({"label_smoothing", "mixup", "pretrained"})

    def padding(self, sample: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """The same image with the class -1."""
        return without_class(sample)

    def metadata(self, data: ImageData) -> dict[str, Any]:
        """Names of the classes."""
        return {"classes": list(data.classes)}

    def build_model(self, data: ImageData) -> nn.Module:
        """Build the model, and check it against the data without computing anything.

        Raises:
            revnets.SpecError: If the model cannot be built, does not accept these images, or has another number of
                classes.
        """
        if len(data.classes) < 2 or "" in data.classes:  # all images are in one directory, or in none
            problem = f"the classes of the images are {', '.join(map(repr, data.classes))}"
            raise run_error("data", problem, "Use one directory per class", code="class-mismatch")
        model = create_model(self.config, num_classes=len(data.classes), in_chans=data.shape[0])
        output = fake_output(model, data.shape)
        if not isinstance(output, Tensor) or output.ndim != 2:
            raise run_error(
                "model", "it does not only return class scores", "Give it a head and no taps", code="shape-mismatch"
            )
        if output.shape[1] != len(data.classes):
            problem = f"the model returns {output.shape[-1]} scores for {len(data.classes)} classes"
            key = "model.num_classes" if isinstance(self.config.model, TimmModel) else "model.head"
            raise run_error(key, problem, f"Set num_classes: {len(data.classes)}", code="class-mismatch")
        return model

    def begin(self, model: nn.Module, data: ImageData, world: World) -> str:
        """Load the pretrained weights of the run, including the classifier if it is for the same classes."""
        assert self.config.pretrained is not None
        from vision.weights import finetune  # few runs need it

        return finetune.begin(model, self.config.pretrained, data.classes, world)

    def training_task(self, model: nn.Module, data: ImageData, device: torch.device) -> TrainingTask:
        """timm's task, with label smoothing, or a loss for the targets of mixup."""
        return ClassificationTask(model, self.criterion, self.criterion_options, device=device, verbose=False)

    @property
    def criterion(self) -> nn.Module | None:
        """The loss of scores and targets; None for timm's."""
        return None

    @property
    def criterion_options(self) -> dict[str, Any]:
        """Arguments of `timm.loss.create_classification_loss`."""
        return {"smoothing": self.config.label_smoothing, "soft_targets": self.config.mixup is not None}

    def augment(self, data: ImageData) -> Callable[[Any], Any] | None:
        """timm's mixup and cutmix, which also smooth the labels."""
        if self.config.mixup is None:
            return None
        options = self.config.mixup.model_dump()
        mixup = Mixup(**options, label_smoothing=self.config.label_smoothing, num_classes=len(data.classes))
        return lambda batch: mixup(*batch)

    def forward(self, training_task: TrainingTask, batch: Any) -> dict[str, Tensor]:
        return training_task(*batch)

    def evaluator(self, model: nn.Module, data: ImageData, device: torch.device) -> AccuracyEvaluator:
        return AccuracyEvaluator(len(data.classes), device)


@dataclass(frozen=True, slots=True)
class ClassificationMetrics:
    """Metrics of one set of weights. Accuracies are percentages, as in timm."""

    loss: float
    top1: float
    top5: float
    images: int  # number of readable images
    confusion: Tensor | None  # counts (true class, predicted class)
    heads: dict[str, float] = field(default_factory=dict)  # top1_COLUMN and so on, of heads at earlier columns

    def scalars(self) -> dict[str, float]:
        """The metrics that are logged."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5, **self.heads}


class AccuracyEvaluator:
    """timm's evaluator, which skips images that do not count, and the confusion matrix.

    Args:
        num_classes: Of the data.
        device: Of the model.
        subset: Maps the scores of the model to the classes of the data (`vision.data.class_subsets.Subset`).
    """

    def __init__(self, num_classes: int, device: torch.device, subset: Callable[[Tensor], Tensor] | None = None):
        self.subset = subset
        self.evaluator: Any = ClassificationEvaluator(device=device)
        is_small = num_classes <= CONFUSIBLE
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device) if is_small else None
        self.seen = torch.zeros((), dtype=torch.long, device=device)

    def update(self, output: Any, batch: tuple[Tensor, Tensor]) -> None:
        """Add the scores (B, classes of the model) of a batch."""
        counts = batch[1] >= 0
        labels, output = batch[1][counts], self.counted(output, counts)
        self.evaluator.update(output, labels)
        self.seen += len(labels)
        if self.confusion is not None:
            guesses = self.final(output).argmax(1)
            self.confusion.index_put_((labels, guesses), torch.ones_like(labels), accumulate=True)

    def counted(self, output: Any, counts: Tensor) -> Any:
        """The scores of the images that count, for the classes of the data."""
        return self.chosen(output[counts])

    def chosen(self, scores: Tensor) -> Tensor:
        """Select the scores of the classes of the data."""
        return scores if self.subset is None else self.subset(scores)

    def final(self, output: Any) -> Tensor:
        """The scores of the model itself."""
        return output

    def compute(self, world: World) -> ClassificationMetrics:
        """The metrics over the images of all processes."""
        found = cast(dict[str, float], dict(self.evaluator.compute(world.size > 1)))
        if world.size > 1:
            for counted in (self.seen, self.confusion):
                if counted is not None:
                    dist.all_reduce(counted)
        loss, top1, top5 = (found.pop(name) for name in ("loss", "top1", "top5"))
        confusion = None if self.confusion is None else self.confusion.cpu()
        return ClassificationMetrics(loss, top1, top5, int(self.seen), confusion, found)
