"""Cut aerial images of the package deepforest into tiles with boxes of tree crowns, in COCO's format.

    pip install --no-deps deepforest
    python examples/scenes/make_trees.py data/trees

The package contains images of Yellowstone of the National Ecological Observatory Network (NEON) with boxes drawn by
hand (Weinstein et al., 2019). One image gives overlapping tiles for training, another one gives separate tiles for
validation. The code is under the MIT license; its license file does not mention the images, so this project contains
none of them.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from revnets.utils.atomic_files import replacing_folder
from vision.data.decoding import read_image

FILES = {
    "training": "2019_YELL_2_528000_4978000_image_crop2",
    "validation": "2019_YELL_2_541000_4977000_image_crop",
}
TILE, STRIDE = 256, {"training": 128, "validation": 256}
"""Pixels along a side of a tile (0.1 m each), and the distance between tiles."""

VISIBLE = 0.4
"""Boxes with a smaller part inside the tile are omitted."""

MAX_BYTES = 2_000_000
"""Maximum size of an annotation file."""


class Crowns(NamedTuple):
    """An aerial image (H, W, 3) and the boxes (N, 4) of its tree crowns: left, top, right, bottom in pixels."""

    pixels: np.ndarray
    boxes: np.ndarray


def read_crowns(folder: Path, name: str) -> Crowns:
    """Read an image and its annotations in the format of Pascal VOC.

    Raises:
        SystemExit: If the image cannot be decoded or is smaller than a tile, or annotations are too large, malformed or
            outside the image.
    """
    path = folder / f"{name}.xml"
    if path.stat().st_size > MAX_BYTES:
        raise SystemExit(f"error: {path} has more than {MAX_BYTES:,} bytes")
    try:
        with (folder / f"{name}.png").open("rb") as file:
            pixels = np.asarray(read_image(file))
    except Exception as error:  # of many types, see `read_image`
        raise SystemExit(f"error: {folder / name}.png cannot be read: {error}") from None
    height, width, _ = pixels.shape
    if min(height, width) < TILE:
        raise SystemExit(f"error: {folder / name}.png has {width} x {height} pixels, but a tile has {TILE} x {TILE}")
    try:
        boxes = np.array(
            [
                [int(box.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax")]
                for box in ElementTree.parse(path).iter("bndbox")
            ]
        ).reshape(-1, 4)
    except (ElementTree.ParseError, ValueError) as error:
        raise SystemExit(f"error: {path} has no valid boxes: {error}") from None
    is_inside = (
        (boxes[:, :2] >= 0).all(1) & (boxes[:, :2] < boxes[:, 2:]).all(1) & (boxes[:, 2:] <= [width, height]).all(1)
    )
    if not is_inside.all():
        raise SystemExit(f"error: {path} has a box that is not inside the image: {boxes[~is_inside][0].tolist()}")
    return Crowns(pixels, boxes)


def boxes_of_tile(boxes: np.ndarray, top: int, left: int) -> np.ndarray:
    """Return the boxes (N, 4) inside a tile, clipped to it and relative to its corner."""
    shifted = boxes - [left, top, left, top]
    clipped = shifted.clip(0, TILE)
    visible = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1) / np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return clipped[visible >= VISIBLE]


def write_split(root: Path, split: str, crowns: Crowns) -> None:
    """Write the tiles and annotations of `training` or `validation`. Training tiles without a box are omitted."""
    height, width, _ = crowns.pixels.shape
    (root / "images" / split).mkdir(parents=True)
    starts = [range(0, size - TILE + 1, STRIDE[split]) for size in (height, width)]
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for top in track(starts[0], split):
        for left in starts[1]:
            boxes = boxes_of_tile(crowns.boxes, top, left)
            if split == "training" and not len(boxes):
                continue
            number = len(images)
            name = f"{top:05}_{left:05}.png"
            Image.fromarray(crowns.pixels[top : top + TILE, left : left + TILE]).save(root / "images" / split / name)
            images.append({"id": number, "file_name": name, "height": TILE, "width": TILE})
            for x0, y0, x1, y1 in boxes.tolist():
                row = {"id": len(annotations), "image_id": number, "category_id": 1, "iscrowd": 0}
                annotations.append({**row, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
    (root / f"instances_{split}.json").write_text(json.dumps(content))
    print(f"{split}: {len(crowns.boxes)} tree crowns, {len(images)} tiles with {len(annotations)} boxes")


def installed_images() -> Path:
    """Return the directory of the images in the installed package.

    Raises:
        SystemExit: If the package is not installed.
    """
    try:
        return Path(str(metadata.distribution("deepforest").locate_file("deepforest/data")))
    except metadata.PackageNotFoundError:
        raise SystemExit("error: deepforest is not installed. Try: pip install --no-deps deepforest") from None


def make(
    root: Annotated[Path, typer.Argument(help="New directory.", show_default=False)],
    images: Annotated[
        Path | None, typer.Option(help="Directory with the images and annotations. By default, that of deepforest.")
    ] = None,
) -> None:
    """Cut aerial images into tiles for detection."""
    if root.exists():
        raise typer.BadParameter(f"{root} already exists. Choose a new directory", param_hint="ROOT")
    source = images or installed_images()
    missing = [
        f"{name}{suffix}"
        for name in FILES.values()
        for suffix in (".png", ".xml")
        if not (source / f"{name}{suffix}").is_file()
    ]
    if missing:
        raise SystemExit(f"error: {source} has no {missing[0]}")
    with replacing_folder(root) as folder:
        for split, name in FILES.items():
            write_split(folder, split, read_crowns(source, name))
    print(f"wrote {root}")


if __name__ == "__main__":
    typer.run(make)
