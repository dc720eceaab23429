"""`revnets predict`: what a trained model finds in pictures, drawn on them, as text and as json."""

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
    """Print what a model finds in pictures, and write it into a folder.

    The folder gets a PNG for each picture, if there is something to draw, and `predictions.json`. Pictures that cannot
    be read are named and left out.

    Args:
        path: a checkpoint, or the folder of a run.
        images: files of pictures.
        output: a folder, in which no file is replaced; it may be None for classes of images, which are printed.
        least: score of objects that are drawn.
        weights: `raw`, `ema` or `auto`.
        device: of the model.
        trust: may the configuration of the run name classes of other projects?

    Raises:
        vision.errors.CheckpointError: the checkpoint cannot be used.
        revnets.SpecError: an option is wrong, or files are there already.
        typer.Exit: pictures could not be read.
    """
    console = Console()
    run = load_run(path, weights, [f"device={device}"], trust=trust)
    predictor = predictor_of(run, least)
    if output is None and predictor.draws:
        raise option_error("--output", "there is no folder for pictures", "Give one: -o predictions", "missing-key")
    targets = _targets(images, output, predictor.draws) if output is not None else [None] * len(images)
    found: dict[int, PicturePrediction] = {}
    with tracked(list(zip(images, targets, strict=True)), "predict", console) as rows:
        for index, (file, target) in enumerate(rows):
            try:
                with open_regular(file) as opened:
                    picture = read_image(opened, *predictor.decoding)
            except Exception as error:  # decoders raise many kinds
                text = f"{printable(str(file))}: cannot be read ({_reason(error)})"
                console.print(text, style="red", soft_wrap=True, highlight=False, markup=False)
                continue
            prediction = predictor(picture)
            found[index] = replace(prediction, picture=None)  # a thousand of them would fill the memory
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
        typer.secho(f"error: {missing} of {len(images)} pictures cannot be read. Check them", fg="red", err=True)
        raise typer.Exit(1)
    return list(found.values())


def _targets(images: Sequence[Path], output: Path, draws: bool) -> list[Path | None]:
    """The file for each picture.

    Raises:
        revnets.SpecError: one is there already, or two have the same name.
    """
    folder = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not folder.is_dir():
        raise option_error("--output", f"{folder} is no folder", "Give another name", code="not-a-folder")
    names = [f"{image.stem}.png" for image in images] if draws else []
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        problem = f"several pictures would be written to {repeated[0]}"
        raise option_error("--output", problem, "Rename them, or give them in turn", code="name-clash")
    if there := [name for name in (*names, PREDICTIONS) if (output / name).exists()]:
        problem = f"{output / there[0]} is there already"
        raise option_error("--output", problem, "Give another folder", code="file-exists")
    return [output / name for name in names] if draws else [None] * len(images)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or printable(first_line(error)) or type(error).__name__


def _save(picture: Image.Image, target: Path) -> None:
    with replacing(target) as file:
        picture.save(file, format="PNG")


def _content(run: LoadedRun, found: Sequence[tuple[Path, PicturePrediction]]) -> dict[str, Any]:
    """All predictions as plain data: a file of COCO's format for objects, otherwise a list of images."""
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
