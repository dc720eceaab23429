"""Inputs of the analyses on the command line: a model with columns, a class, and an image."""

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
    """Load a model with its data, and return them with its reversible columns.

    Args:
        source: A checkpoint of `revnets train`; the directory of a run, for its best or last checkpoint; or a timm
            model name or a run configuration, which are newly initialized (or loaded with `model.pretrained=true`).
        overrides: Overrides of the run configuration, such as `data.root=/data/imagenet` or `memory=store`.
        weights: Weights of a checkpoint: `raw`, `ema` (averaged over training), or `auto` for `ema` if available.
        trust: Whether the configuration may name classes of other projects.

    Raises:
        vision.errors.CheckpointError: If the checkpoint is unusable.
        revnets.SpecError: If the source does not exist, an override is invalid, or the model has no reversible columns.
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
        problem = "not a checkpoint, a run directory, a timm model or a run configuration"
        hint = nearest(source, known, "Models with columns are")
        raise SpecError(source, "", problem, hint, code="unknown-model")
    columns = columns_of(run.model)
    if columns is None:
        raise SpecError(
            source,
            "",
            "this model has no reversible columns",
            "Use a model such as revcol_tiny",
            code="no-columns",
        )
    return run, columns


def batch_plan(run: LoadedRun, size: int, count: int) -> tuple[int, int | None]:
    """Return the size and number of batches of the validation set; the number is None if a stream has no length.

    Args:
        run: The model with its data.
        size: Requested batch size.
        count: Requested number of batches; 0 for the whole validation set.
    """
    if run.config.batch_is_stream:
        return size, count or None
    available = len(run.data.val)
    size = min(size, available)
    return size, min(count, -(-available // size)) if count else -(-available // size)


def class_number(classes: Sequence[str], name: str) -> int:
    """Return the index of a class from its name or index.

    Raises:
        revnets.SpecError: If the class does not exist.
    """
    if name in classes:
        return classes.index(name)
    if name.isdecimal() and len(name) < 20 and int(name) < len(classes):
        return int(name)
    raise option_error(
        "--class", f"there is no class {name!r}", nearest(name, classes, "Choose one of"), code="unknown-choice"
    )


def caption(classes: Sequence[str], scores: Tensor, shown: int, true: int | None) -> str:
    """Return a caption with the predicted class of scores (num_classes,), the class shown, and the true class."""
    shares = scores.softmax(0)
    best = int(shares.argmax())
    lines = [f"predicted: {classes[best]}, {float(shares[best]):.0%}"]
    if shown != best:
        lines.insert(0, f"shown: {classes[shown]}, {float(shares[shown]):.0%}")
    return "\n".join([*lines, *([f"true: {classes[true]}"] if true is not None else [])])


def image_at(run: LoadedRun, index: int) -> tuple[Tensor, int]:
    """Return image `index` of the validation set, (1, C, H, W), and its class.

    Raises:
        revnets.SpecError: If the image does not exist or cannot be read.
    """
    try:
        image, label = run.val_image(index)
    except IndexError as error:
        raise option_error("--index", str(error), "Use a lower index", code="out-of-range") from None
    if label < 0:
        raise option_error("--index", f"image {index} cannot be read", "Use another index", code="unreadable-data")
    return image, label


def image_from(run: LoadedRun, path: Path) -> Tensor:
    """Read an image file and transform it like the validation set, (1, C, H, W).

    Raises:
        revnets.SpecError: If the file cannot be read.
    """
    mode, exif = run.decoding
    try:
        with open_regular(path) as file, warnings.catch_warnings(action="ignore"):  # Pillow's, about large images
            picture = read_image(file, mode, exif)
    except Exception as error:  # decoders raise many types
        problem = printable(f"{path} cannot be read ({getattr(error, 'strerror', None) or first_line(error)})")
        raise option_error(
            "--image", problem, "Use an image file such as a .jpg or .png", code="unreadable-file"
        ) from None
    return run.transform(picture)[None].to(run.device)
