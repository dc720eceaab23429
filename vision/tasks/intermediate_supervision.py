"""Image classification with intermediate supervision: losses and accuracies at several columns (section 2.3, D.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from vision.config.learning import Stop
from vision.data.dataset import ImageData
from vision.errors import first_line, run_error
from vision.models.architecture import RevCol
from vision.supervision.supervised import HeadsEvaluator, Outputs, Supervised
from vision.supervision.task import SupervisionTask
from vision.tasks.classification import AccuracyEvaluator, Classification


class SupervisedClassification(Classification):
    """Classification of a run with the key `supervision`."""

    uses = Classification.uses | {"supervision"}

    def training_task(self, model: nn.Module, data: ImageData, device: torch.device) -> TrainingTask:
        """The model with heads at its columns, and the compound loss.

        Raises:
            revnets.SpecError: If the model does not support intermediate supervision.
        """
        if not isinstance(model, RevCol):
            problem = f"{type(model).__name__} has no reversible columns"
            raise run_error(
                "supervision", problem, "Give a RevCol of timm, as in {timm: revcol_tiny}", code="no-columns"
            )
        options = {"device": device, "verbose": False}
        try:
            task = SupervisionTask(
                model, self.config.supervision, self.criterion, self.criterion_options, data.mean, data.std, **options
            )
        except ValueError as error:
            raise run_error(
                "supervision", first_line(error), "See docs/guides/training.md", code="conflicting-values"
            ) from None
        task.trainable_module.to(device)  # pyright: ignore[reportFunctionMemberAccess]
        return task

    def evaluator(self, model: nn.Module, data: ImageData, device: torch.device) -> HeadsAccuracyEvaluator:
        return HeadsAccuracyEvaluator(cast(Supervised, model).stops, len(data.classes), device)


class HeadsAccuracyEvaluator(AccuracyEvaluator):
    """Accuracy of every head. The last one is that of the model.

    Args:
        stops: The heads.
        num_classes, device, subset: as for `AccuracyEvaluator`.
    """

    def __init__(
        self,
        stops: Sequence[Stop],
        num_classes: int,
        device: torch.device,
        subset: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(num_classes, device, subset)
        self.evaluator = HeadsEvaluator(stops, device=device)

    def counted(self, output: Outputs, counts: Tensor) -> Outputs:
        return Outputs({column: self.chosen(scores[counts]) for column, scores in output.logits.items()}, {})

    def final(self, output: Outputs) -> Tensor:
        return output.logits[max(output.logits)]
