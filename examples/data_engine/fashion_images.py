"""Fashion-MNIST as PNG files: images with and without labels, test images, and planted duplicates.

For the search for duplicates, images are enlarged four times, to 112 x 112 pixels. Recompressing or resampling at
28 x 28 removes the details that distinguish similar images.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vision.data.in_memory import IDX, read_idx

ENLARGED = 112


def _mirrored(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(picture)


def _cropped(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    size = random.uniform(0.9, 0.97) * ENLARGED
    left, top = random.uniform(0, ENLARGED - size, 2)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box=(left, top, left + size, top + size))


def _recompressed(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=40)
    return Image.open(file).convert("L")


def _brightened(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(random.choice([0.6, 0.75, 1.2, 1.3]))


def _bordered(picture: Image.Image, random: np.random.Generator) -> Image.Image:
    framed = ImageOps.expand(picture, int(random.integers(4, 11)), int(random.choice([0, 128, 255])))
    return framed.resize(picture.size, Image.Resampling.BICUBIC)


CHANGES: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "flip": _mirrored,
    "crop": _cropped,
    "jpeg": _recompressed,
    "brightness": _brightened,
    "border": _bordered,
}
"""Changes of test images before they are planted. File names begin with the name of the change."""


VALIDATION = 50
"""Training images that are evaluated during a run; no choice depends on them."""


def write_images(root: Path, folder: Path, images: int, labeled: int, test: int) -> None:
    """Write `data/train/CLASS`, `data/validation/CLASS`, `data/test/CLASS`, and `web`, which has no classes.

    Args:
        root: Directory with the four idx files.
        folder: Where to write.
        images: Training images, the last `VALIDATION` of them for validation.
        labeled: Training images that keep their labels.
        test: Test images.
    """
    pixels, classes = (read_idx(root, name, axes).numpy() for name, axes in zip(IDX["train"], (3, 1), strict=True))
    tests, test_classes = (read_idx(root, name, axes).numpy() for name, axes in zip(IDX["val"], (3, 1), strict=True))
    for number in range(images):
        split = "train" if number < labeled else "validation"
        in_web = labeled <= number < images - VALIDATION
        place = f"web/{number // 1000:02d}" if in_web else f"data/{split}/{classes[number]}"
        _save(Image.fromarray(pixels[number]), folder / place / f"{number:05d}.png")
    for number in range(test):
        _save(Image.fromarray(tests[number]), folder / f"data/test/{test_classes[number]}/{number:05d}.png")


def write_planted(root: Path, folder: Path, searched: int, against: int, planted: int) -> dict[str, str]:
    """Write `searched`, enlarged training images with changed test images among them, and `against`, test images.

    Args:
        root: Directory with the four idx files.
        folder: Where to write.
        searched: Number of training images, the last ones of the set.
        against: Number of test images.
        planted: Number of test images that are changed, by each of `CHANGES` in turn.

    Returns:
        Keys of test images by the keys of their planted duplicates.
    """
    random = np.random.default_rng(1)
    images, tests = (read_idx(root, IDX[split][0], 3).numpy() for split in ("train", "val"))
    for number in range(len(images) - searched, len(images)):
        _save(_enlarged(images[number]), folder / f"searched/{number:05d}.png")
    for number in range(against):
        _save(_enlarged(tests[number]), folder / f"against/{number:05d}.png")
    found = {}
    for place in range(planted):
        name, change = list(CHANGES.items())[place % len(CHANGES)]
        key = f"{name}-{place:05d}.png"
        _save(change(_enlarged(tests[place]), random), folder / "searched" / key)
        found[key] = f"{place:05d}.png"
    return found


def _enlarged(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).resize((ENLARGED, ENLARGED), Image.Resampling.BICUBIC)


def _save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
