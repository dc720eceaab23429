"""How good are the weights: loss, top-1 and top-5 on the validation set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vision.config.supervision import Stop
from vision.supervision.supervised import HeadsEvaluator, Outputs, Supervised

CONFUSIBLE = 1000
"""Up to so many classes it is counted which is taken for which; for 21841 the table would take 4 GB."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Of one set of weights. Accuracies are percentages, as in timm."""

    loss: float
    top1: float
    top5: float
    images: int  # those that could be read
    confusion: Tensor | None  # (true class, predicted class), counts
    heads: dict[str, float] = field(default_factory=dict)  # top1_COLUMN and so on, of heads at earlier columns

    def scalars(self) -> dict[str, float]:
        """What goes into logs."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5, **self.heads}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    tick: Callable[[], None] = lambda: None,
    distributed: bool = False,
    subset: Callable[[Tensor], Tensor] | None = None,
) -> Metrics:
    """Run the model over a validation set. It is in evaluation mode meanwhile and gets its own mode back.

    Args:
        model: gives scores (B, num_classes), or is a `Supervised`: then the metrics are those of its last head, and
            the others come as `heads`.
        loader: images and class numbers; images of class -1 do not count.
        tick: called after every batch; whatever it raises ends the evaluation.
        distributed: every process has its share of the set, and all get the metrics of the whole.
        subset: maps the scores of the model to the `num_classes` classes of the data
            (`vision.data.class_subsets.Subset`).
    """
    stops = model.stops if isinstance(model, Supervised) else [Stop(0, 0.0, 1.0)]
    evaluator = HeadsEvaluator(stops, device=device)
    is_small = num_classes <= CONFUSIBLE
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device) if is_small else None
    training, seen = model.training, torch.zeros((), dtype=torch.long, device=device)
    model.eval()
    try:
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast():
                output = model(images)
            counts = labels >= 0
            labels, of_heads = labels[counts], output.logits if isinstance(output, Outputs) else {0: output}
            of_heads = {column: scores[counts] for column, scores in of_heads.items()}
            if subset is not None:
                of_heads = {column: subset(scores) for column, scores in of_heads.items()}
            evaluator.update(Outputs(of_heads, {}), labels)
            seen += len(labels)
            if confusion is not None:
                guesses = of_heads[max(of_heads)].argmax(1)
                confusion.index_put_((labels, guesses), torch.ones_like(labels), accumulate=True)
            tick()
    finally:
        model.train(training)
    found = dict(evaluator.compute(distributed))
    if distributed:
        for counted in (seen, confusion):
            if counted is not None:
                dist.all_reduce(counted)
    loss, top1, top5 = (found.pop(name) for name in ("loss", "top1", "top5"))
    return Metrics(loss, top1, top5, int(seen), None if confusion is None else confusion.cpu(), found)
