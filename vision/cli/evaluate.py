"""The command `revnets eval`: the metrics of a checkpoint as a table, and the confusion matrix as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

from revnets.cli.output import tracked
from revnets.config.errors import option_error
from revnets.plotting.style import FORMATS, save
from vision.checkpoints import reader
from vision.config.data import ImagesConfig
from vision.config.run import TrainConfig, load_config
from vision.data import class_subsets
from vision.data.dataset import ImageData
from vision.detection.average_precision import DetectionMetrics
from vision.distributed.context import World
from vision.errors import CheckpointError, comparable, run_error
from vision.tasks import builders
from vision.tasks.base import scalars
from vision.tasks.builders import create_task
from vision.tasks.classification import AccuracyEvaluator, Classification, ClassificationMetrics
from vision.training.figures import confusion_figure
from vision.training.loaded_run import load_checkpoint
from vision.training.train_state import evaluate
from vision.weights import files, finetune


@dataclass(frozen=True, slots=True)
class Candidate:
    """Sets of weights to evaluate, and the configuration of the evaluation.

    Attributes:
        path: Of the checkpoint.
        config: Of the run.
        sets: Tensors of the model and of intermediate heads, by `raw` and `ema`.
        classes: Names of the model's classes, if the file has them.
        is_run: Whether it is a checkpoint of `revnets train`. Other files have only weights, under any names.
        category_ids: COCO category ids of a detector's classes.
    """

    path: Path
    config: TrainConfig
    sets: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
    classes: tuple[str, ...] | None
    is_run: bool
    category_ids: tuple[int, ...] | None = None


def evaluate_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    png: Path | None = None,
    recipe: str | None = None,
    by_name: bool = False,
    trust: bool = False,
) -> dict[str, Any]:
    """Print the metrics of every set of weights in a checkpoint.

    Args:
        path: A checkpoint, or the directory of a run: then its best checkpoint, or the last if none is marked as best.
            With `recipe`, a file with only weights, in our or in the official layout.
        overrides: Of the run configuration, such as `batch_size=256`.
        png: Path of a figure of the confusion matrix, of the averaged weights if there are any.
        recipe: The YAML of a run, or the name of a recipe, with the model and the data of the weights.
        by_name: Whether the data has a subset of the model's classes, matched by name (`vision.data.class_subsets`).
        trust: Whether the configuration, in the checkpoint or of `recipe`, may name classes of other projects.

    Returns:
        The metrics by the names of the sets of weights.

    Raises:
        vision.errors.CheckpointError: If there is no such checkpoint, or it cannot be used.
        revnets.SpecError: If an override or the suffix of `png` is wrong, or the classes do not match.
    """
    if png is not None and png.suffix.lower().removeprefix(".") not in FORMATS:
        raise option_error(
            "--png", f"{png} has no known suffix", f"Use one of .{', .'.join(FORMATS)}", code="unknown-suffix"
        )
    console = Console()
    given = _of_run(path, overrides, trust) if recipe is None else _of_weights(path, recipe, overrides, trust)
    config, device = given.config, builders.choose_device(given.config.device)
    if by_name and not any(text.strip().startswith("data.num_classes") for text in overrides):
        config = _without_count(config)
    task = create_task(config)
    has_one_set = isinstance(task, Classification) and config.heads is None
    if not has_one_set:
        _refuse_classes(config, png, by_name)
    data = task.load_data()
    if config.heads is None and not has_one_set:  # `_known` compares those of a classifier
        _require_same_classes(given, task.metadata(data))
    for remark in getattr(data, "remarks", ()):
        console.print(remark, style="yellow", soft_wrap=True, highlight=False, markup=False)
    chosen, known = _known(given, data, by_name, console) if has_one_set else (None, data)
    training_task = builders.build_task(
        config.model_copy(update={"ema": None}), task.build_model(known), known, device, task
    )
    module = builders.unwrapped(training_task.get_trainable_module())
    model = builders.unwrapped(training_task.get_eval_model())
    autocast = builders.build_autocast(config.amp, device)
    batches = cast(Sequence[Any], task.val_batches(data, World()))
    found = {}
    for name, (tensors, heads) in given.sets.items():
        fitting = tensors if given.is_run else finetune.fitted(tensors, model, str(given.path))
        reader.load_weights(model, fitting, given.path)
        reader.load_heads(training_task.get_task_state(), heads, given.path)
        evaluator = task.evaluator(module, data, device)
        if isinstance(evaluator, AccuracyEvaluator):
            evaluator.subset = chosen
        with tracked(batches, name, console) as bar:
            found[name] = evaluate(task, module, bar, evaluator, device, autocast)
    counting = list(found.values())[-1]
    if isinstance(counting, DetectionMetrics):
        _print_precisions(console, given.path, found, len(data.val))
        return found
    if not isinstance(counting, ClassificationMetrics):
        console.print(str(given.path), soft_wrap=True, highlight=False, markup=False)
        console.print(_table({name: scalars(metrics) for name, metrics in found.items()}))
        return found
    unread = max(0, len(data.val) - counting.images)  # the length of a stream may be unknown
    text = f"{given.path}, {counting.images} images" + (f"; {unread} others cannot be read" if unread else "")
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    table = Table()
    for heading in ("weights", "top-1 %", "top-5 %", "loss"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    for name, metrics in found.items():
        for row in _rows(name, metrics):
            table.add_row(*row)
    console.print(table)
    if png is not None:
        if counting.confusion is None:
            raise option_error(
                "--png", f"{len(data.classes)} classes are too many to draw", "Remove the option", code="out-of-range"
            )
        save(confusion_figure(counting.confusion, data.classes), png)
        console.print(f"wrote {png}", soft_wrap=True, highlight=False, markup=False)
    return found


def _of_run(path: Path, overrides: Sequence[str], trust: bool) -> Candidate:
    found = load_checkpoint(path, overrides, trust=trust)
    return Candidate(found.path, found.config, found.weight_sets, found.classes, True, found.category_ids)


def _of_weights(path: Path, recipe: str, overrides: Sequence[str], trust: bool) -> Candidate:
    config = load_config(recipe, overrides, trust=trust).model_copy(update={"supervision": None})
    content, name = finetune.find_pretrained(str(path), World())
    sets = {"raw": files.tensors_in(content, "raw", path)}
    with suppress(CheckpointError):  # the file has no averaged weights
        sets["ema"] = files.tensors_in(content, "ema", path)
    classes = finetune.class_names_in(content)
    return Candidate(Path(name), config, {key: (tensors, {}) for key, tensors in sets.items()}, classes, is_run=False)


def _without_count(config: TrainConfig) -> TrainConfig:
    """Remove `num_classes`, so that the number of classes is that of the data."""
    if not isinstance(config.data, ImagesConfig):
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"num_classes": None})})


def _known(
    given: Candidate, data: ImageData, by_name: bool, console: Console
) -> tuple[class_subsets.Subset | None, ImageData]:
    """How to select the scores of the data's classes, and the data with all classes of the model."""
    count = len(given.classes) if given.classes else files.class_count(given.sets["raw"][0])
    if not by_name:
        if count and count != len(data.classes):
            problem = f"the weights are for {count} classes, but the data has {len(data.classes)}"
            hint = "If the data has a subset of the model's classes, add --subset, which matches them by name"
            raise option_error("--subset", problem, hint, code="class-mismatch")
        if given.classes and (difference := class_subsets.class_difference(given.classes, data.classes)):
            if set(map(comparable, given.classes)) == set(map(comparable, data.classes)):  # in another order
                return class_subsets.subset(given.classes, data.classes), replace(data, classes=given.classes)
            hint = "Give data with the classes of the model, or add --subset, which matches them by name"
            raise option_error("--subset", difference, hint, code="class-mismatch")
        named = sum(not name.isdecimal() for name in data.classes)
        if 0 < named < len(data.classes):
            text = (
                f"data.num_classes is {len(data.classes)}, but the data names {named} classes, used as the first ones."
            )
            console.print(f"{text} To match them by name, add --subset", style="yellow", soft_wrap=True)
        return None, data
    known = given.classes or class_subsets.imagenet_classes(count)
    chosen = class_subsets.subset(known, data.classes)
    text = f"{len(data.classes) - len(chosen.unknown)} of {len(known)} classes"
    if chosen.unknown:
        names = ", ".join(chosen.unknown[:3]) + ", ..." * (len(chosen.unknown) > 3)
        text += f"; the model does not have {len(chosen.unknown)} of the data ({names}), whose images count as wrong"
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    return chosen, replace(data, classes=known)


def _refuse_classes(config: TrainConfig, png: Path | None, by_name: bool) -> None:
    """Refuse options about classes for a task without a single set of classes."""
    for option, given in (("--png", png is not None), ("--subset", by_name)):
        if given:
            sets = "no classes" if config.heads is None else "several sets of classes"
            problem = f"the task {config.task_and_options[0]} has {sets}"
            raise option_error(option, problem, "Remove the option")


def _require_same_classes(given: Candidate, metadata: Mapping[str, Any]) -> None:
    """Refuse data whose classes, according to the task, differ from those of the weights or are in another order."""
    classes, ids = metadata.get("classes"), metadata.get("category_ids")
    if not classes or not given.classes:
        return
    if len(classes) != len(given.classes):
        difference = f"{len(classes)} classes, but the weights are for {len(given.classes)}"
    elif not (difference := class_subsets.class_difference(given.classes, classes)):
        if not ids or given.category_ids is None or tuple(ids) == given.category_ids:
            return
        difference = "its category ids are not those of the run"
    raise run_error("data", difference, "Give data with the classes of the model, in its order", "class-mismatch")


def _print_precisions(console: Console, path: Path, found: Mapping[str, DetectionMetrics], images: int) -> None:
    """Print a row for the boxes and one for the masks of each set of weights, with a dash without such objects."""
    seen = list(found.values())[-1].images
    text = f"{path}, {seen} images" + (f"; {images - seen} others cannot be read" if seen < images else "")
    console.print(text, soft_wrap=True, highlight=False, markup=False)
    headings = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
    table = Table("weights", *(Column(heading, justify="right") for heading in headings))
    for name, metrics in found.items():
        for kind, values in (("boxes", metrics.box), ("masks", metrics.mask)):
            if values is not None:
                table.add_row(f"{name}, {kind}", *(f"{x:.2f}" if x == x else "-" for x in values.values()))
    console.print(table)


def _table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """A table with a row for each set of weights and a column for each metric."""
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    table = Table("weights", *(Column(name, justify="right") for name in names))
    for weights, metrics in found.items():
        table.add_row(weights, *(f"{metrics[name]:.4f}" if name in metrics else "" for name in names))
    return table


def _rows(name: str, metrics: ClassificationMetrics) -> Iterator[tuple[str, str, str, str]]:
    """Yield a row for each head at an earlier column, and one for the model's own head."""
    columns = [key.removeprefix("top1_") for key in metrics.heads if key.startswith("top1_")]
    for column in columns:
        top1, top5, loss = (metrics.heads[f"{key}_{column}"] for key in ("top1", "top5", "loss"))
        what = "column" if column.isdecimal() else "head"
        yield f"{name}, {what} {column}", f"{top1:.2f}", f"{top5:.2f}", f"{loss:.4f}"
    yield name, f"{metrics.top1:.2f}", f"{metrics.top5:.2f}", f"{metrics.loss:.4f}"
