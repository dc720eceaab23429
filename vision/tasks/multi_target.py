"""Classification with several sets of classes, each with its own head (RevCol, appendix C.1).

As in Ghiasi et al., "Multi-Task Self-Training for Learning General Representations" (ICCV 2021), a model trains on the
labels that an image has: classes of one data set, soft labels of a teacher for others. The heads are slices of one
classifier, so every model with a classifier supports them, and classifiers at earlier columns are sliced likewise.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn

from vision.config.data import images_in
from vision.data.dataset import ImageData, Unreadable
from vision.distributed.context import World
from vision.errors import run_error
from vision.supervision.supervised import Outputs
from vision.tasks.classification import Classification, ClassificationMetrics
from vision.tasks.intermediate_supervision import SupervisedClassification


class MultiTarget(Classification):
    """Classification with several heads: `heads: {in1k: 1000, places: 365}` in the run.

    A training batch is images (B, C, H, W) and targets (B, classes of all heads), which are zeros for heads without a
    label. A validation batch has class numbers (B, heads) instead, which are -1 for heads without a class.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"label_smoothing", "pretrained", "heads"})

    @property
    def heads(self) -> dict[str, int]:
        """Number of classes of each head, in the order of the model's scores."""
        return dict(self.config.heads or {})

    def load_data(self, notes: Path | None = None, world: World | None = None) -> ImageData:
        from vision.pseudo_labels.sources import load_sources
        from vision.pseudo_labels.targets import HeadTargets

        images = images_in(self.config.data)
        if images is None:
            problem = "this data set has one set of classes"
            raise run_error("data", problem, "Give images in class directories", code="conflicting-values")
        targets = HeadTargets(self.heads, self.config.label_smoothing)
        unreadable = Unreadable(notes, images.unreadable)
        config = cast(Any, self.config.data)
        workers = (
            self.config.workers if world is not None else None
        )  # without a distributed context, nothing is trained
        return load_sources(config, targets, self.config.seed, unreadable, world or World(), workers)

    @property
    def criterion(self) -> nn.Module:
        return HeadsCrossEntropy(self.heads)

    @property
    def criterion_options(self) -> dict[str, Any]:
        return {}

    def augment(self, data: ImageData) -> Callable[[Any], Any] | None:
        return None

    def evaluator(self, model: nn.Module, data: ImageData, device: torch.device) -> Any:
        return MultiTargetEvaluator(self.heads, device)


class SupervisedMultiTarget(MultiTarget, SupervisedClassification):
    """Classification with several heads and intermediate supervision."""

    uses: ClassVar[frozenset[str]] = MultiTarget.uses | {"supervision"}

    def evaluator(self, model: nn.Module, data: ImageData, device: torch.device) -> Any:
        return MultiTargetEvaluator(self.heads, device)


class HeadsCrossEntropy(nn.Module):
    """Cross entropies of all heads, with targets that are distributions, or zeros without a label.

    They are summed over heads, and averaged over all images of a batch, including those without a label. So the
    gradient of several batches, or processes, equals that of all their images together.

    Args:
        heads: Number of classes of each head.
    """

    def __init__(self, heads: Mapping[str, int]):
        super().__init__()
        self.sizes = list(heads.values())

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        """The loss of scores and targets (B, classes of all heads)."""
        pairs = zip(scores.split(self.sizes, 1), targets.split(self.sizes, 1), strict=True)
        losses = [-(target * score.float().log_softmax(1)).sum(1) for score, target in pairs]
        return torch.stack(losses).sum(0).mean()


class MultiTargetEvaluator:
    """Top-1 and top-5 accuracy of every head on the images that have a class of this head.

    `loss`, `top1` and `top5` are those of the first head with such images. Those of other heads are named `top1_NAME`,
    and those of the first head at earlier columns `top1_COLUMN`.

    Args:
        heads: Number of classes of each head.
        device: Of the model.
    """

    def __init__(self, heads: Mapping[str, int], device: torch.device):
        self.heads = dict(heads)
        self.evaluators: defaultdict[tuple[int, str], Any] = defaultdict(
            lambda: ClassificationEvaluator(device=device)
        )  # by column and head

    def update(self, output: Tensor | Outputs, batch: tuple[Tensor, Tensor]) -> None:
        """Add the scores (B, classes of all heads) of a batch."""
        columns = output.logits if isinstance(output, Outputs) else {0: output}
        for column, scores in columns.items():
            slices = scores.split(list(self.heads.values()), 1)
            for name, logits, classes in zip(self.heads, slices, batch[1].unbind(1), strict=True):
                counts = classes >= 0
                self.evaluators[column, name].update(logits[counts], classes[counts])

    def compute(self, world: World) -> ClassificationMetrics:
        """The metrics over the images of all processes."""
        found = {place: dict(one.compute(world.size > 1)) for place, one in self.evaluators.items()}
        last = max(column for column, _ in found)
        images = {name: world.sum(int(self.evaluators[last, name].counts[0])) for name in self.heads}
        main = next((name for name, count in images.items() if count), next(iter(images)))
        shown = {str(column): values for (column, name), values in found.items() if column != last and name == main}
        shown |= {name: found[last, name] for name, count in images.items() if count and name != main}
        named = {f"{key}_{place}": value for place, values in shown.items() for key, value in values.items()}
        loss, top1, top5 = (found[last, main][key] for key in ("loss", "top1", "top5"))
        return ClassificationMetrics(loss, top1, top5, sum(images.values()), None, named)
