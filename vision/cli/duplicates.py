"""The command `revnets duplicates`. Heavy imports wait until it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from revnets.cli.options import Trust, check_place
from revnets.config.errors import option_error
from vision.cli.common import reported


def duplicates(
    folder: Annotated[
        Path, typer.Argument(help="Labels of the images, from revnets label.", show_default=False, readable=False)
    ],
    against: Annotated[
        Path,
        typer.Option(
            help="Images that must not be among them, or labels of these; FOLDER: duplicates inside of it.",
            show_default=False,
            readable=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Parquet file of the pairs; beside it goes a list of keys.")
    ] = Path("suspects.parquet"),
    png: Annotated[
        Path | None, typer.Option(help="Draw the pairs side by side.", show_default=False, readable=False)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The images of FOLDER, if they were moved.", show_default=False, readable=False)
    ] = None,
    against_images: Annotated[
        Path | None,
        typer.Option(help="The images of labels in --against, if they were moved.", show_default=False, readable=False),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="The teacher, if it was moved; its features are compared too.", show_default=False),
    ] = None,
    by: Annotated[
        Literal["labels", "features"], typer.Option(help="What candidates have in common: labels, or features.")
    ] = "labels",
    max_distance: Annotated[float, typer.Option(min=0, max=1, help="Of labels (Hellinger).")] = 0.5,
    max_bits: Annotated[int, typer.Option(min=0, max=256, help="In which perceptual hashes differ.")] = 60,
    min_correlation: Annotated[float, typer.Option(min=-1, max=1, help="Of aligned pixels.")] = 0.93,
    min_cosine: Annotated[float, typer.Option(min=-1, max=1, help="Of the teacher's features.")] = 0.6,
    nearest: Annotated[int, typer.Option(min=1, max=1000, help="Pairs of an image that are looked at.")] = 2,
    device: Annotated[str, typer.Option(help="auto: the GPU if there is one.")] = "auto",
    trust: Trust = False,
) -> None:
    """Find images that are near-duplicates of those of a validation set, by their pseudo-labels.

    Pairs with near labels are compared by perceptual hashes, by aligned pixels
    and, with --teacher, by features. Nothing is deleted: the list of keys goes
    into data.exclude of a run, after a look at the contact sheet.

    revnets duplicates labels --against /data/imagenet/val --png sheet.png
    """
    with reported(extra="duplicates"):
        if output.suffix != ".parquet":
            problem, remedy = f"{output} is no .parquet", "Let it end in .parquet"
            raise option_error("--output", problem, remedy, code="unknown-suffix")
        check_place("--output", output)
        check_place("--output", output.with_suffix(".txt"))
        if png is not None:
            if png.suffix.lower() != ".png":
                raise option_error("--png", f"{png} is no .png", "Let it end in .png", code="unknown-suffix")
            check_place("--png", png)
        from vision.near_duplicates.search import search_duplicates
        from vision.near_duplicates.suspects import Limits

        limits = Limits(max_distance, max_bits, min_correlation, min_cosine, nearest)
        search_duplicates(folder, against, output, png, images, against_images, teacher, limits, by, device, trust)
