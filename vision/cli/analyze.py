"""The commands `revnets analyze cka` and `layercam`. Slow imports are deferred until a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from revnets.cli.options import Trust
from revnets.cli.output import Csv, Png, deliver, outputs, print_rows, progress
from vision.cli.common import Overrides, reported

SourceArgument = Annotated[
    str,
    typer.Argument(
        help="A checkpoint, the directory of a run (its best one), a timm model or the YAML of a run.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    Literal["auto", "raw", "ema"],
    typer.Option(help="Weights of a checkpoint; auto: the averaged ones (ema) if there are any, else raw."),
]


def cka(
    source: SourceArgument,
    overrides: Overrides = None,
    batch: Annotated[int, typer.Option(min=4, help="Images that are compared with each other.")] = 512,
    batches: Annotated[int, typer.Option(min=0, help="Batches over which HSIC is summed; 0: the whole set.")] = 1,
    shuffle: Annotated[bool, typer.Option(help="Draw images at random, or use the first ones.")] = True,
    weights: WeightsOption = "auto",
    png: Png = Path("cka.png"),
    csv: Csv = None,
    trust: Trust = False,
) -> None:
    """Measure the similarity of every level of every column to images and labels (figure 9).

    CKA with the unbiased, linear HSIC, on the validation set. The paper's code
    uses one large batch (--no-shuffle --batch 512); with --batches, HSIC is
    summed over many small batches, which needs less memory and covers more
    images.

    revnets analyze cka runs/fashion --png cka.png
    revnets analyze cka revcol_tiny model.pretrained=true data.name=folder data.root=/data/imagenet
    """
    with reported():
        from rich.console import Console

        from vision.analysis.cka import similarity, similarity_rows, similarity_table
        from vision.analysis.figures import cka_figure
        from vision.analysis.inputs import batch_plan, load_source

        png, csv = outputs(png, csv)
        console = Console()
        run, columns = load_source(source, overrides or [], weights, trust)
        size, count = batch_plan(run, batch, batches)
        with progress(console, count) as (tell, advance):
            tell(f"{size} images per batch")
            found = similarity(run.model, columns, run.val_batches(size, count, shuffle), advance)
        found.require_defined()
        print_rows(console, f"CKA by level, over {found.samples} images in batches of {size}", similarity_table(found))
        written = deliver(cka_figure(found), png, similarity_rows(found), csv)
        console.print(written, soft_wrap=True, highlight=False, markup=False)


def layercam(
    source: SourceArgument,
    overrides: Overrides = None,
    index: Annotated[int, typer.Option(min=0, help="Index of the image in the validation set.")] = 0,
    image: Annotated[
        Path | None, typer.Option(help="An image file to use instead.", show_default=False, readable=False)
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--class", help="Name or number of the class; by default the predicted one.", show_default=False),
    ] = None,
    weights: WeightsOption = "auto",
    png: Png = Path("layercam.png"),
    csv: Csv = None,
    trust: Trust = False,
) -> None:
    """Show where every level of every column responds to a class: LayerCAM over an image (figure 8).

    Works in any memory mode, which memory=store and similar overrides select.

    revnets analyze layercam runs/fashion --index 7 --png layercam.png
    """
    with reported():
        import torch
        from rich.console import Console

        from vision.analysis.figures import layercam_figure
        from vision.analysis.inputs import caption, class_number, image_at, image_from, load_source
        from vision.analysis.layercam import layercam as maps_of
        from vision.analysis.layercam import map_rows

        png, csv = outputs(png, csv)
        console = Console()
        with progress(console, None) as (tell, _):
            tell("reading")
            run, columns = load_source(source, overrides or [], weights, trust)
            wanted = None if target is None else torch.tensor([class_number(run.classes, target)], device=run.device)
            pixels, true = (image_from(run, image), None) if image else image_at(run, index)
            tell("one forward and backward pass")
            found = maps_of(run.model, columns, pixels, wanted)
        text = caption(run.classes, found.scores[0], int(found.classes[0]), true)
        console.print(text.replace("\n", "; "), markup=False, highlight=False)
        grid = found.grid(columns)
        figure = layercam_figure(run.pixels(pixels[0]), grid, text)
        console.print(deliver(figure, png, map_rows(grid), csv), soft_wrap=True, highlight=False, markup=False)
