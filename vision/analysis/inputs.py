"""What an analysis on the command line looks at: a model with columns, a class, and an image."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import timm
from torch import Tensor

from revnets import ReversibleColumns, SpecError
from revnets.config.errors import nearest, option_error
from revnets.utils.regular_files import open_regular
from vision.config.run import load_config
from vision.data.decoding import read_image
from vision.errors import first_line, printable
from vision.paths import CONFIGS
from vision.tasks.builders import columns_of
from vision.training.loaded_run import LoadedRun, fresh_run, load_run


def load_source(
    source: str, overrides: Sequence[str] = (), weights: str = "auto", trust: bool = False
) -> tuple[LoadedRun, ReversibleColumns]:
    """A model with its data, and its reversible columns.

    Args:
        source: a checkpoint of `revnets train`, or the folder of a run: then its best one, or the last. Or a model of
            timm's or a YAML of a run, with the weights of its initialisation (or with `model.pretrained=true`).
        overrides: of the run's configuration, such as `data.root=/data/imagenet` or `memory=store`.
        weights: of a checkpoint: `raw`, `ema` (averaged over training), or `auto` for the averaged ones if it has any.
        trust: may the configuration, of a checkpoint or a YAML, name classes of other projects?

    Raises:
        vision.errors.CheckpointError: the checkpoint cannot be used.
        revnets.SpecError: there is no such thing, an override is wrong, or the model has no reversible columns.
    """
    path = Path(source)
    if path.suffix.lower() not in (".yaml", ".yml") and path.exists():
        run = load_run(path, weights, overrides, trust=trust)
    elif timm.is_model(source):
        run = fresh_run(load_config({"model": {"timm": source}, "output": "."}, overrides, trust=trust), source)
    elif path.exists() or (CONFIGS / f"{source}.yaml").exists():
        run = fresh_run(load_config(source, overrides, trust=trust), source)
    else:
        known = [*timm.list_models("*revcol*"), *(file.stem for file in CONFIGS.glob("*.yaml"))]
        problem = "neither a checkpoint, the folder of a run, a model of timm's, nor a YAML of a run"
        raise SpecError(source, "", problem, nearest(source, known, "Models with columns are"), code="unknown-model")
    columns = columns_of(run.model)
    if columns is None:
        raise SpecError(
            source,
            "",
            "this model has no reversible columns",
            "Give one that has, such as revcol_tiny",
            code="no-columns",
        )
    return run, columns


def batch_plan(run: LoadedRun, size: int, count: int) -> tuple[int, int | None]:
    """Size and number of the batches of the validation set that there will be; None if a stream does not tell.

    Args:
        size, count: what is asked for; a count of 0 is the whole validation set.
    """
    if run.config.batch_is_stream:
        return size, count or None
    there = len(run.data.val)
    size = min(size, there)
    return size, min(count, -(-there // size)) if count else -(-there // size)


def class_number(classes: Sequence[str], name: str) -> int:
    """The number of a class, from its name or from the number itself.

    Raises:
        revnets.SpecError: there is no such class.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and len(name) < 20 and int(name) < len(classes):
        return int(name)
    raise option_error(
        "--class", f"there is no class {name!r}", nearest(name, classes, "There are"), code="unknown-choice"
    )


def caption(classes: Sequence[str], scores: Tensor, shown: int, true: int | None) -> str:
    """What is predicted with scores (num_classes,), which class is `shown`, and which is right if that is known."""
    shares = scores.softmax(0)
    best = int(shares.argmax())
    lines = [f"predicted: {classes[best]}, {float(shares[best]):.0%}"]
    if shown != best:
        lines.insert(0, f"looked for: {classes[shown]}, {float(shares[shown]):.0%}")
    return "\n".join([*lines, *([f"true: {classes[true]}"] if true is not None else [])])


def image_at(run: LoadedRun, index: int) -> tuple[Tensor, int]:
    """Image number `index` of the validation set, (1, C, H, W), and its class.

    Raises:
        revnets.SpecError: there is none, or it cannot be read.
    """
    try:
        image, label = run.val_image(index)
    except IndexError as error:
        raise option_error("--index", str(error), "Give a lower number", code="out-of-range") from None
    if label < 0:
        raise option_error("--index", f"image {index} cannot be read", "Give another", code="unreadable-data")
    return image, label


def image_from(run: LoadedRun, path: Path) -> Tensor:
    """A picture from any file, (1, C, H, W), as the validation set would have it.

    Raises:
        revnets.SpecError: it cannot be read.
    """
    mode, exif = run.decoding
    try:
        with open_regular(path) as file, warnings.catch_warnings(action="ignore"):  # Pillow's about large pictures
            picture = read_image(file, mode, exif)
    except Exception as error:  # decoders raise whatever they like
        problem = printable(f"{path} cannot be read ({getattr(error, 'strerror', None) or first_line(error)})")
        raise option_error(
            "--image", problem, "Give a picture such as a .jpg or .png", code="unreadable-file"
        ) from None
    return run.transform(picture)[None].to(run.device)
