"""`revnets eval`: the metrics of a checkpoint as a table, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from revnets import SpecError
from revnets.draw import FORMATS, save
from vision import checkpoint, parts
from vision.config import load_config
from vision.data import load_data, val_loader
from vision.errors import CheckpointError
from vision.evaluate import Metrics, evaluate
from vision.figures import confusion_figure
from vision.parallel import plain


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
    task = parts.build_task(config.model_copy(update={"ema": None}), parts.build_model(config, data), data, device)
    module, model = plain(task.get_trainable_module()), plain(task.get_eval_model())
    autocast = parts.build_autocast(config.amp, device)
    batches = val_loader(config, data)
    table = Table()
    for heading in ("weights", "top-1 %", "top-5 %", "loss"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    console, found = Console(), {}
    for name, key, heads in (("raw", "model", "heads"), ("ema", "ema", "heads_ema")):
        if state[key] is not None:
            checkpoint.load_weights(model, state[key], path)
            checkpoint.load_heads(module, state[heads], path)
            bar = track(batches, name, console=console, transient=True, disable=not console.is_terminal)
            found[name] = metrics = evaluate(module, bar, len(data.classes), device, autocast)
            for row in _rows(name, metrics):
                table.add_row(*row)
    counting = list(found.values())[-1]
    unread = max(0, len(data.val) - counting.images)  # a stream may not know its length
    text = f"{path}, {counting.images} images" + (f"; {unread} more cannot be read" if unread else "")
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    if png is not None:
        if counting.confusion is None:
            raise SpecError(
                "command line", "--png", f"{len(data.classes)} classes are too many to draw", "Leave it out"
            )
        save(confusion_figure(counting.confusion, data.classes), png)
        console.print(f"wrote {png}", soft_wrap=True, highlight=False, markup=False)
    return found


def _rows(name: str, metrics: Metrics) -> Iterator[tuple[str, str, str, str]]:
    """A row for each head at an earlier column, and one for the model's own."""
    columns = [key.removeprefix("top1_") for key in metrics.heads if key.startswith("top1_")]
    for column in columns:
        top1, top5, loss = (metrics.heads[f"{key}_{column}"] for key in ("top1", "top5", "loss"))
        yield f"{name}, column {column}", f"{top1:.2f}", f"{top5:.2f}", f"{loss:.4f}"
    yield name, f"{metrics.top1:.2f}", f"{metrics.top5:.2f}", f"{metrics.loss:.4f}"


def _checkpoint_of(path: Path) -> Path:
    if not path.is_dir() or (path / "state.pt").exists():
        return path
    run = checkpoint.Checkpoints(path / "checkpoints", keep=1)
    for candidate in (run.best, *reversed(run.all())):
        if candidate.exists():
            return candidate
    raise CheckpointError(path, "this folder holds no checkpoints", "Give a run, or a checkpoint")
