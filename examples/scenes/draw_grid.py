"""Draw a grid of scenes: ground truth in the upper row, predictions of `revnets predict` in the lower row.

revnets predict runs/scenes_detection data/scenes/images/validation/0000[0-3].png -o predictions
python examples/scenes/draw_grid.py data/scenes predictions detection.png
python examples/scenes/draw_grid.py data/scenes predictions segmentation.png --maps
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from vision.detection.coco_json import read_coco
from vision.detection.instance_masks import dense_mask
from vision.training.drawing import draw_classes, draw_detections

SPLIT = "validation"
COLORS = 96
"""Colors of the palette of the grid, which keeps the file small."""


def drawn_objects(root: Path, names: list[str]) -> list[Image.Image]:
    """Draw the annotated boxes, and masks if there are any, on the images of these file names."""
    path = root / f"instances_{SPLIT}.json"
    annotations = read_coco(path)
    if not any(image.objects for image in annotations.images):  # objects without a mask were omitted
        annotations = read_coco(path, with_masks=False)
    images = {image.file_name: image for image in annotations.images}
    pictures = []
    for name in names:
        image = images[name]
        found = {
            "boxes": torch.tensor([list(item.box) for item in image.objects]).float().reshape(-1, 4),
            "labels": torch.tensor([item.label for item in image.objects]),
            "scores": torch.ones(len(image.objects)),
        }
        masks = [
            dense_mask(item.segmentation, image.height, image.width) for item in image.objects if item.segmentation
        ]
        if masks:
            found["masks"] = torch.from_numpy(np.stack(masks))
        scene = Image.open(root / "images" / SPLIT / name).convert("RGB")
        pictures.append(draw_detections(scene, found, annotations.classes, 0.5))
    return pictures


def drawn_maps(root: Path, names: list[str]) -> list[Image.Image]:
    """Draw the annotated classes of the pixels of the scenes of these file names."""
    pictures = []
    for name in names:
        scene = Image.open(root / "images" / SPLIT / name).convert("RGB")
        numbers = torch.from_numpy(np.asarray(Image.open(root / "annotations" / SPLIT / name)).astype(np.int64))
        pictures.append(draw_classes(scene, numbers, classes_of(root)))
    return pictures


def classes_of(root: Path) -> list[str]:
    """Return the class names of the scenes."""
    return (root / "classes.txt").read_text().splitlines()


def draw(
    root: Annotated[Path, typer.Argument(help="Directory of the scenes.")],
    predictions: Annotated[Path, typer.Argument(help="Output directory of `revnets predict`.")],
    output: Annotated[Path, typer.Argument(help="PNG file to write.")],
    maps: Annotated[bool, typer.Option("--maps", help="Draw class maps instead of objects.")] = False,
    height: Annotated[int, typer.Option(min=32, help="Height of a scene in the grid, in pixels.")] = 220,
) -> None:
    """Draw ground truth above predictions, a column per scene."""
    names = sorted(path.name for path in predictions.glob("*.png"))
    if not names:
        raise typer.BadParameter(f"{predictions} has no PNG files", param_hint="PREDICTIONS")
    rows = [(drawn_maps if maps else drawn_objects)(root, names), [Image.open(predictions / name) for name in names]]
    sizes = [[(round(height * one.width / one.height), height) for one in row] for row in rows]
    widths = [max(width for width, _ in column) for column in zip(*sizes, strict=True)]
    page = Image.new("RGB", (sum(widths) + 4 * (len(names) - 1), 2 * height + 4), (255, 255, 255))
    for line, (row, row_sizes) in enumerate(zip(rows, sizes, strict=True)):
        for column, (picture, size) in enumerate(zip(row, row_sizes, strict=True)):
            small = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
            page.paste(small, (sum(widths[:column]) + 4 * column, line * (height + 4)))
    page.quantize(COLORS, dither=Image.Dither.NONE).save(output, optimize=True)
    print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(draw)
