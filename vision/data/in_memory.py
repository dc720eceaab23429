"""Data sets that are held in memory: scikit-learn's digits, and files in MNIST's idx format."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vision.config.data import DigitsConfig, IdxConfig, SmallImagesConfig
from vision.data.dataset import ImageData
from vision.data.samplers import Key
from vision.errors import first_line, run_error

IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Names of the four files of MNIST and data sets in its format."""

BOUND = 2**27
"""Bytes that decompressed or enlarged images may always occupy."""

EXPANSION = 24
"""Largest expansion of larger images by decompression; images of handwriting are compressed about 5 to 1."""


def load_digits(config: DigitsConfig, seed: int) -> ImageData:
    """Load the digits: 1437 for training and 360 for validation.

    Args:
        config: Of the data.
        seed: Of the augmentations.
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    digits: Any = load()
    images = torch.from_numpy(digits.images).float()[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    side = config.img_size
    images = F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(digits.target).long()
    train, val = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    names = tuple(str(name) for name in digits.target_names)
    return _data(config, seed, (images[train], labels[train]), (images[val], labels[val]), names)


def load_idx(config: IdxConfig, seed: int) -> ImageData:
    """Load the four files in `config.root`, gzipped or not. Images are padded or shrunk to `img_size`.

    Args:
        config: Of the data.
        seed: Of the augmentations.

    Raises:
        revnets.SpecError: If a file is missing, damaged or not in idx format, or the files do not match each other.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    side = config.img_size
    for part, (images_name, labels_name) in IDX.items():
        images, labels = read_idx(Path(config.root), images_name, 3), read_idx(Path(config.root), labels_name, 1)
        if len(images) != len(labels):
            problem = f"{images_name} has {len(images)} images, but {labels_name} has {len(labels)} labels"
            raise run_error(
                "data.root", f"{config.root}: {problem}", "Give files of one data set", code="misaligned-data"
            )
        if (size := len(images) * side**2) > max(BOUND, EXPANSION * images.nbytes):
            height, width = images.shape[1:]
            problem = f"{side}, but {images_name} has {len(images)} images of {height} x {width}: {size} bytes"
            raise run_error("data.img_size", problem, "Lower it, or check the file", code="out-of-range")
        found[part] = (_resized(images[:, None], side), labels.long())
    count = int(max(labels.max() for _, labels in found.values())) + 1
    names = config.classes or tuple(str(number) for number in range(count))
    if len(names) < count:
        raise run_error(
            "data.classes", f"{len(names)} names for {count} classes", "Name every class", code="wrong-length"
        )
    images, labels = (tensor[: config.train_samples] for tensor in found["train"])
    data = _data(config, seed, (images, labels), found["val"], names)
    strange = sorted(set(found["val"][1].tolist()) - set(labels.tolist()))
    remarks = (f"the training set has no image of the class {names[strange[0]]}",) if strange else ()
    return replace(data, remarks=remarks)


def read_idx(folder: Path, name: str, axes: int) -> Tensor:
    """Read an idx file of bytes (yann.lecun.com/exdb/mnist).

    Args:
        folder: Directory of the file.
        name: Of the file, without .gz.
        axes: Number of axes of the tensor.

    Raises:
        revnets.SpecError: If the file is missing, damaged, or of another type or shape.
    """
    path = next((path for path in (folder / name, folder / f"{name}.gz") if os.path.isfile(path)), None)
    if path is None:
        problem = f"{folder} has no {name}, gzipped or not"
        raise run_error("data.root", problem, "Give the directory with the four idx files", code="missing-file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            magic, *sizes = struct.unpack(f">{1 + axes}i", file.read(4 * (1 + axes)))
            if magic != 0x0800 + axes or min(sizes) < 1:
                raise ValueError(f"not an idx file of bytes with {axes} axes")
            count, on_disk = math.prod(sizes), path.stat().st_size  # the sizes are untrusted
            if count > (max(BOUND, EXPANSION * on_disk) if path.suffix == ".gz" else on_disk):
                raise ValueError(f"{on_disk} bytes cannot contain {' x '.join(map(str, sizes))} values")
            data = file.read(count + 1)
        if len(data) != count:
            more = "more" if len(data) > count else f"{len(data)}"
            raise ValueError(f"it has {more} bytes for {' x '.join(map(str, sizes))} values")
        return torch.from_numpy(np.frombuffer(data, np.uint8).reshape(sizes).copy())
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        text = getattr(error, "strerror", None) or first_line(error)
        raise run_error("data.root", f"{path}: {text}", "Download the file again", code="damaged-file") from None


def _resized(images: Tensor, side: int) -> Tensor:
    """Pad images (N, 1, H, W) of bytes with black, or shrink them, to (N, 1, side, side)."""
    height, width = images.shape[-2:]
    if height > side or width > side:
        return F.interpolate(images.float(), (side, side), mode="area").round().byte()
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(images, (left, side - width - left, top, side - height - top))


def _data(
    config: SmallImagesConfig,
    seed: int,
    train: tuple[Tensor, Tensor],
    val: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
) -> ImageData:
    pixels = scaled(train[0])
    mean, std = pixels.mean().item(), pixels.std().item()
    if not std > 0:
        problem = "all pixels of the training images are equal"
        raise run_error("data.root", problem, "Check the files", code="unreadable-data")
    return ImageData(
        train=Augmented(*train, RandomAffine(config, seed), mean, std),
        val=Plain((scaled(val[0]) - mean) / std, val[1]),
        classes=classes,
        shape=(1, config.img_size, config.img_size),
        mean=(mean,),
        std=(std,),
    )


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory, indexed by `Key`, augmented and normalized batch by batch."""

    def __init__(self, images: Tensor, labels: Tensor, augment: RandomAffine, mean: float, std: float):
        self.images, self.labels, self.augment = images, labels, augment
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, Tensor]]:
        index = [key.index for key in keys]
        images = (self.augment(scaled(self.images[index]), keys) - self.mean) / self.std
        return list(zip(images, self.labels[index], strict=True))


class Plain(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory without augmentation."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def scaled(images: Tensor) -> Tensor:
    """Scale bytes to [0, 1]. Floats are returned unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


class RandomAffine:
    """A random rotation, scaling, shift and flip of every image, drawn from (seed, epoch, index)."""

    def __init__(self, config: SmallImagesConfig, seed: int):
        self.limits = np.array([math.radians(config.rotate), config.scale, config.shift, config.shift])
        self.hflip, self.seed = config.hflip, seed

    def __call__(self, images: Tensor, keys: Sequence[Key]) -> Tensor:
        """Transform images (B, C, H, W). Pixels from outside of an image are black."""
        if not self.limits.any() and not self.hflip:
            return images
        generators = [np.random.default_rng((self.seed, *key)) for key in keys]
        draws = np.stack([generator.uniform(-1, 1, 4) for generator in generators]) * self.limits
        angle, growth, right, down = torch.from_numpy(draws).float().unbind(1)
        mirrored = torch.tensor([generator.random() < self.hflip for generator in generators])
        cos, sin = angle.cos() / (1 + growth), angle.sin() / (1 + growth)
        # affine_grid maps the result's coordinates, from -1 to 1 over the image, to the source's.
        matrix = torch.stack([cos, -sin, 2 * right, sin, cos, 2 * down], dim=1).view(-1, 2, 3)
        matrix[mirrored, 0] *= -1
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)
