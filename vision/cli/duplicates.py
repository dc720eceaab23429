"""The command `revnets duplicates`. Slow imports are deferred until it runs."""

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
            help="Images to compare with, or their labels; FOLDER itself to find duplicates within the set.",
            show_default=False,
            readable=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Parquet file of the pairs. A list of keys is written next to it.")
    ] = Path("suspects.parquet"),
    png: Annotated[
        Path | None, typer.Option(help="Draw the pairs side by side.", show_default=False, readable=False)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="The images of FOLDER, if they have moved.", show_default=False, readable=False)
    ] = None,
    against_images: Annotated[
        Path | None,
        typer.Option(help="The images of --against, if they have moved.", show_default=False, readable=False),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="The teacher, if it has moved; its features are also compared.", show_default=False),
    ] = None,
    by: Annotated[
        Literal["labels", "features"], typer.Option(help="Find candidates by similar labels or by similar features.")
    ] = "labels",
    max_distance: Annotated[float, typer.Option(min=0, max=1, help="Largest distance of labels (Hellinger).")] = 0.5,
    max_bits: Annotated[int, typer.Option(min=0, max=256, help="Most bits in which perceptual hashes differ.")] = 60,
    min_correlation: Annotated[
        float, typer.Option(min=-1, max=1, help="Smallest correlation of aligned pixels.")
    ] = 0.93,
    min_cosine: Annotated[float, typer.Option(min=-1, max=1, help="Smallest cosine of the teacher's features.")] = 0.6,
    nearest: Annotated[int, typer.Option(min=1, max=1000, help="Nearest pairs per image to compare further.")] = 2,
    device: Annotated[str, typer.Option(help="auto: the GPU if there is one.")] = "auto",
    trust: Trust = False,
) -> None:
    """Find near-duplicates of the images of a validation set by their pseudo-labels.

    Pairs with similar labels are compared by perceptual hashes, by aligned
    pixels and, with --teacher, by features. Nothing is deleted: check the
    contact sheet, and give the list of keys to a run as data.exclude.

    revnets duplicates labels --against /data/imagenet/val --png sheet.png
    """
    with reported(extra="duplicates"):
        if output.suffix != ".parquet":
            problem = f"{output} does not have the suffix .parquet"
            raise option_error("--output", problem, "Give a path that ends in .parquet", code="unknown-suffix")
        check_place("--output", output)
        check_place("--output", output.with_suffix(".txt"))
        if png is not None:
            if png.suffix.lower() != ".png":
                problem = f"{png} does not have the suffix .png"
                raise option_error("--png", problem, "Give a path that ends in .png", code="unknown-suffix")
            check_place("--png", png)
        from vision.near_duplicates.search import search_duplicates
        from vision.near_duplicates.suspects import Limits

        limits = Limits(max_distance, max_bits, min_correlation, min_cosine, nearest)
        search_duplicates(folder, against, output, png, images, against_images, teacher, limits, by, device, trust)
