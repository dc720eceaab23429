"""Make scenes with exact boxes, masks and class maps: clothes in front of textures, for detectors and segmenters.

    apt install dataset-fashion-mnist && pip install scikit-image
    python examples/scenes/make_scenes.py data/scenes                        # 6,000 and 300 scenes of 128 x 160
    python examples/scenes/make_scenes.py data/few --train 100 --val 20      # a quick look

A scene shows one to three clothes of Fashion-MNIST in front of one or two textures of scikit-image. The clothes are
tinted, 36 to 71 pixels wide, and may occlude each other. Validation scenes show clothes of the test set and parts of
the textures that are in no training scene. `data: {name: coco}` and `data: {name: semantic_maps}` read the directory.
`objects` has a crop of each object in one directory per class, for `data: {name: folder}`. The same seed makes the
same files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from PIL import Image
from rich.progress import track

from revnets import SpecError
from revnets.utils.atomic_files import replacing_folder
from vision.data.in_memory import read_idx
from vision.detection.instance_masks import packed_mask

THINGS = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
STUFF = ("grass", "gravel", "brick", "coffee", "hubble_deep_field")
HEIGHT, WIDTH = 128, 160
COUNT, SIDE = (1, 3), (36, 72)
"""Range of the number of clothes in a scene (inclusive), and of their size in pixels (the end is exclusive)."""

LEAST_PIXELS = 40
"""Clothes with fewer visible pixels are not annotated."""

CROP = 64
"""Size of the object crops, in pixels."""

TRAINED_PART = 0.6
"""Fraction of each texture, from the left, for training scenes. Validation scenes use the rest."""


class Scene(NamedTuple):
    """An image with its annotations.

    Attributes:
        pixels: uint8 image (H, W, 3).
        masks: Visible pixels (H, W) of each object.
        classes: Class of each object, an index into `THINGS`.
        numbers: Class map (H, W); the classes of `STUFF` follow those of `THINGS`.
    """

    pixels: np.ndarray
    masks: list[np.ndarray]
    classes: list[int]
    numbers: np.ndarray


def clothes(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 28, 28) and classes (N,) of a split of Fashion-MNIST, `train` or `t10k`."""
    images, labels = (
        read_idx(folder, f"{split}-{name}-ubyte", axes) for name, axes in (("images-idx3", 3), ("labels-idx1", 1))
    )
    return images.numpy(), labels.numpy()


def textures(part: str) -> list[np.ndarray]:
    """Return the part of each image of `STUFF` (H, W, 3) for a split, `training` or `validation`."""
    import skimage

    found = []
    for name in STUFF:
        file = next((Path(skimage.__file__).parent / "data").glob(f"{name}.*"))
        pixels = np.asarray(Image.open(file).convert("RGB"))
        border = round(TRAINED_PART * pixels.shape[1])
        found.append(pixels[:, :border] if part == "training" else pixels[:, border:])
    return found


def scene(generator: np.random.Generator, items: np.ndarray, labels: np.ndarray, behind: Sequence[np.ndarray]) -> Scene:
    """Compose a scene from images (N, 28, 28) of clothes, their classes (N,), and textures (H, W, 3)."""
    pixels, numbers = background(generator, behind)
    masks: list[np.ndarray] = []
    classes: list[int] = []
    for _ in range(generator.integers(COUNT[0], COUNT[1] + 1)):
        index, side = generator.integers(len(items)), int(generator.integers(*SIDE))
        item = np.asarray(Image.fromarray(items[index]).resize((side, side), Image.Resampling.BILINEAR))
        top, left = (int(generator.integers(-side // 4, length - 3 * side // 4)) for length in (HEIGHT, WIDTH))
        whole = np.zeros((HEIGHT + 2 * side, WIDTH + 2 * side), np.uint8)  # with a margin of one item
        whole[top + side : top + 2 * side, left + side : left + 2 * side] = item
        whole = whole[side:-side, side:-side]
        mask = whole > 24
        pixels[mask] = (whole[mask][:, None] * generator.uniform(0.4, 1, 3)).astype(np.uint8)
        numbers[mask] = labels[index]
        masks = [other & ~mask for other in masks]
        masks.append(mask)
        classes.append(int(labels[index]))
    seen = [place for place, mask in enumerate(masks) if mask.sum() >= LEAST_PIXELS]
    return Scene(pixels, [masks[place] for place in seen], [classes[place] for place in seen], numbers)


def background(generator: np.random.Generator, behind: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (H, W, 3) of one texture, or of one above another, and their classes (H, W)."""
    pixels, numbers = np.zeros((HEIGHT, WIDTH, 3), np.uint8), np.zeros((HEIGHT, WIDTH), np.uint8)
    line = int(generator.integers(HEIGHT // 3, 2 * HEIGHT // 3)) if generator.random() < 0.7 else HEIGHT
    for rows in (slice(0, line), slice(line, HEIGHT)):
        kind = int(generator.integers(len(behind)))
        top, left = (
            int(generator.integers(side - part))
            for side, part in zip(behind[kind].shape, (HEIGHT, WIDTH), strict=False)
        )
        pixels[rows] = behind[kind][top : top + HEIGHT, left : left + WIDTH][rows]
        numbers[rows] = len(THINGS) + kind
    return pixels, numbers


def annotations_of(found: Scene, image: int) -> list[dict[str, Any]]:
    """Return the COCO annotations of a scene, without ids."""
    rows = []
    for mask, kind in zip(found.masks, found.classes, strict=True):
        lines, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top, right, bottom = (int(value) for value in (columns[0], lines[0], columns[-1] + 1, lines[-1] + 1))
        box = [left, top, right - left, bottom - top]
        row = {"image_id": image, "category_id": kind + 1, "bbox": box, "area": int(mask.sum()), "iscrowd": 0}
        rows.append({**row, "segmentation": packed_mask(mask)})
    return rows


def write_crops(folder: Path, name: str, found: Scene) -> None:
    """Write a square crop around each object, a fifth larger than the object, into the directory of its class."""
    for number, (mask, kind) in enumerate(zip(found.masks, found.classes, strict=True)):
        lines, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        side = int(1.2 * (max(np.ptp(lines), np.ptp(columns)) + 1))
        top, left = (int(ends[0] + ends[-1] + 1 - side) // 2 + side for ends in (lines, columns))
        around = np.pad(found.pixels, ((side, side), (side, side), (0, 0)), mode="edge")
        crop = Image.fromarray(around[top : top + side, left : left + side])
        place = folder / THINGS[kind] / f"{name}-{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        crop.resize((CROP, CROP), Image.Resampling.BILINEAR).save(place)


def write_split(root: Path, split: str, count: int, fashion: Path, seed: int) -> None:
    """Write images, class maps, annotations and object crops of `training` or `validation`."""
    items, labels = clothes(fashion, "train" if split == "training" else "t10k")
    behind = textures(split)
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True)
    images, annotations = [], []
    for number in track(range(count), split):
        found = scene(np.random.default_rng((seed, split == "training", number)), items, labels, behind)
        name = f"{number:05}.png"
        Image.fromarray(found.pixels).save(root / "images" / split / name)
        Image.fromarray(found.numbers).save(root / "annotations" / split / name)
        images.append({"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH})
        annotations += annotations_of(found, number)
        write_crops(root / "objects" / split, f"{number:05}", found)
    numbered = [{"id": number, **row} for number, row in enumerate(annotations)]
    categories = [{"id": number, "name": name} for number, name in enumerate(THINGS, 1)]
    content = {"images": images, "annotations": numbered, "categories": categories}
    (root / f"instances_{split}.json").write_text(json.dumps(content))


def make(
    root: Annotated[Path, typer.Argument(help="New directory.", show_default=False)],
    train: Annotated[int, typer.Option(min=1, max=99_999, help="Number of training scenes.")] = 6000,
    val: Annotated[int, typer.Option(min=1, max=99_999, help="Number of validation scenes.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the generator.")] = 0,
    fashion: Annotated[Path, typer.Option(help="Directory with the four idx files of Fashion-MNIST.")] = Path(
        "/usr/share/datasets/fashion-mnist"
    ),
) -> None:
    """Make scenes for detection and segmentation."""
    if root.exists():
        raise typer.BadParameter(f"{root} already exists. Choose a new directory", param_hint="ROOT")
    try:
        with replacing_folder(root) as folder:
            write_split(folder, "training", train, fashion, seed)
            write_split(folder, "validation", val, fashion, seed)
            (folder / "classes.txt").write_text("\n".join((*THINGS, *STUFF)) + "\n")
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: {error.name} is not installed. Try: pip install scikit-image") from None
    except SpecError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {root}")


if __name__ == "__main__":
    typer.run(make)
