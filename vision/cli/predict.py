"""The command `revnets predict`: predictions for image files, as drawings, text and JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from PIL import Image
from rich.console import Console

from revnets.cli.output import tracked
from revnets.config.errors import option_error
from revnets.utils.atomic_files import replacing
from revnets.utils.regular_files import open_regular
from vision.data.decoding import read_image
from vision.errors import first_line, printable
from vision.training.loaded_run import LoadedRun, load_run
from vision.training.predictors import PicturePrediction, predictor_of

PREDICTIONS = "predictions.json"


def predict_files(
    path: Path,
    images: Sequence[Path],
    output: Path | None,
    least: float = 0.5,
    weights: str = "auto",
    device: str = "auto",
    trust: bool = False,
) -> list[PicturePrediction]:
    """Print predictions for image files, and write them to a directory.

    The directory receives `predictions.json`, and a PNG for each image if the task draws its predictions. Images that
    cannot be read are reported and skipped.

    Args:
        path: A checkpoint, or the directory of a run.
        images: Image files.
        output: A directory, in which no file is replaced; None to only print the classes of a classifier.
        least: Minimum score of drawn objects.
        weights: `raw`, `ema` or `auto`.
        device: Of the model.
        trust: Whether the configuration of the run may name classes of other projects.

    Returns:
        The predictions for the readable images.

    Raises:
        vision.errors.CheckpointError: If the checkpoint cannot be used.
        revnets.SpecError: If an option is wrong, or output files already exist.
        typer.Exit: If some images could not be read.
    """
    console = Console()
    run = load_run(path, weights, [f"device={device}"], trust=trust)
    predictor = predictor_of(run, least)
    if output is None and predictor.draws:
        problem = "this task draws images and needs a directory"
        raise option_error("--output", problem, "Give one, as in -o predictions", "missing-key")
    targets = _targets(images, output, predictor.draws) if output is not None else [None] * len(images)
    found: dict[int, PicturePrediction] = {}
    with tracked(list(zip(images, targets, strict=True)), "predict", console) as rows:
        for index, (file, target) in enumerate(rows):
            try:
                with open_regular(file) as opened:
                    picture = read_image(opened, *predictor.decoding)
            except Exception as error:  # decoders raise errors of any type
                text = f"{printable(str(file))}: cannot be read ({_reason(error)})"
                console.print(text, style="red", soft_wrap=True, highlight=False, markup=False)
                continue
            prediction = predictor(picture)
            found[index] = replace(prediction, picture=None)  # drawings of many images would fill the memory
            console.print(f"{printable(str(file))}: {prediction.text}", soft_wrap=True, highlight=False, markup=False)
            if target is not None and prediction.picture is not None:
                _save(prediction.picture, target)
    if output is not None:
        content = _content(run, [(images[index], prediction) for index, prediction in found.items()])
        with replacing(output / PREDICTIONS, "w") as opened:
            json.dump(content, opened, allow_nan=False)
        console.print(f"wrote {output / PREDICTIONS}", soft_wrap=True, highlight=False, markup=False)
    if len(found) < len(images):
        missing = len(images) - len(found)
        typer.secho(f"error: {missing} of {len(images)} images cannot be read. Check them", fg="red", err=True)
        raise typer.Exit(1)
    return list(found.values())


def _targets(images: Sequence[Path], output: Path, draws: bool) -> list[Path | None]:
    """The output file of each image.

    Raises:
        revnets.SpecError: If an output file already exists, or two images have the same output file.
    """
    folder = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not folder.is_dir():
        raise option_error("--output", f"{folder} is not a directory", "Give another path", code="not-a-folder")
    names = [f"{image.stem}.png" for image in images] if draws else []
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        problem = f"several images would be written to {repeated[0]}"
        raise option_error("--output", problem, "Rename them, or use several commands", code="name-clash")
    if there := [name for name in (*names, PREDICTIONS) if (output / name).exists()]:
        problem = f"{output / there[0]} already exists"
        raise option_error("--output", problem, "Give another directory", code="file-exists")
    return [output / name for name in names] if draws else [None] * len(images)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or printable(first_line(error)) or type(error).__name__


def _save(picture: Image.Image, target: Path) -> None:
    with replacing(target) as file:
        picture.save(file, format="PNG")


def _content(run: LoadedRun, found: Sequence[tuple[Path, PicturePrediction]]) -> dict[str, Any]:
    """All predictions as plain data: in COCO's format for objects, otherwise a list of images."""
    numbers = run.category_ids
    if numbers is None:
        return {
            "images": [
                {"file_name": str(file), "height": item.height, "width": item.width, "text": item.text}
                | ({"scores": item.scores} if item.scores else {})
                for file, item in found
            ]
        }
    images = [
        {"id": number, "file_name": file.name, "height": item.height, "width": item.width}
        for number, (file, item) in enumerate(found, 1)
    ]
    rows = [(number, row) for number, (_, item) in enumerate(found, 1) for row in item.annotations]
    annotations = [{"id": place, "image_id": number, **row} for place, (number, row) in enumerate(rows, 1)]
    categories = [{"id": number, "name": name} for number, name in zip(numbers, run.classes, strict=True)]
    return {"images": images, "categories": categories, "annotations": annotations}
