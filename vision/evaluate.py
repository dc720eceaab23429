"""How good are the weights: loss, top-1 and top-5 on the validation set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from revnets import SpecError
from revnets.draw import FORMATS, save
from vision import checkpoint, parts
from vision.config import load_config
from vision.data import load_data, val_loader
from vision.figures import confusion_figure


@dataclass(frozen=True, slots=True)
class Metrics:
    """Of one set of weights. Accuracies are percentages, as in timm."""

    loss: float
    top1: float
    top5: float
    images: int
    confusion: Tensor  # (true class, predicted class), counts

    def scalars(self) -> dict[str, float]:
        """What goes into logs."""
        return {"loss": self.loss, "top1": self.top1, "top5": self.top5}


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    tick: Callable[[], None] = lambda: None,
) -> Metrics:
    """Run the model over a validation set. It is in evaluation mode meanwhile and gets its own mode back.

    Args:
        tick: called after every batch; whatever it raises ends the evaluation.
    """
    evaluator = ClassificationEvaluator(device)
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.long, device=device)
    training = model.training
    model.eval()
    try:
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            with autocast():
                output = model(images)
            evaluator.update(output, labels)
            confusion.index_put_((labels, output.argmax(1)), torch.ones_like(labels), accumulate=True)
            tick()
    finally:
        model.train(training)
    found = evaluator.compute()
    return Metrics(found["loss"], found["top1"], found["top5"], evaluator.num_samples, confusion.cpu())


def evaluate_checkpoint(path: Path, overrides: Sequence[str] = (), png: Path | None = None) -> dict[str, Metrics]:
    """Print the metrics of every set of weights that a checkpoint holds.

    Args:
        path: a checkpoint, or the folder of a run: then its best one, or the last if none is marked as the best.
        overrides: of the run's configuration, such as `batch_size=256`.
        png: where to draw the confusion of the weights that count, the averaged ones if there are any.

    Raises:
        vision.checkpoint.CheckpointError: there is no such checkpoint, or it cannot be used.
        revnets.SpecError: an override is wrong, or `png` has another suffix than those of pictures.
    """
    if png is not None and png.suffix.lower().removeprefix(".") not in FORMATS:
        raise SpecError("command line", "--png", f"{png} is no picture", f"Let it end in .{', .'.join(FORMATS)}")
    path = _checkpoint_of(path)
    state = checkpoint.read(path)
    config = load_config(state["config"], overrides)
    device = parts.choose_device(config.device)
    data = load_data(config.data, config.seed)
    model = parts.build_model(config, data).to(device)
    autocast = parts.build_autocast(config.amp, device)
    batches = val_loader(config, data)
    table = Table()
    for heading in ("weights", "top-1 %", "top-5 %", "loss"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    found = {}
    for name, key in (("raw", "model"), ("ema", "ema")):
        if state[key] is not None:
            checkpoint.load_weights(model, state[key], path)
            found[name] = metrics = evaluate(model, batches, len(data.classes), device, autocast)
            table.add_row(name, f"{metrics.top1:.2f}", f"{metrics.top5:.2f}", f"{metrics.loss:.4f}")
    console = Console()
    console.print(f"{path}, {len(data.val)} images", soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    if png is not None:
        save(confusion_figure(list(found.values())[-1].confusion, data.classes), png)
        console.print(f"wrote {png}", soft_wrap=True, highlight=False, markup=False)
    return found


def _checkpoint_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    run = checkpoint.Checkpoints(path / "checkpoints", keep=1)
    candidates = [run.best, *reversed(run.all())]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    raise checkpoint.CheckpointError(path, "this folder holds no checkpoints", "Give a run, or a .pt file")
