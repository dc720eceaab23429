"""Images with a class for every pixel, in the directory layout of ADE20K, and their augmentation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from revnets.utils.regular_files import open_regular
from vision.config.data import SemanticMapsConfig
from vision.data.class_maps import read_class_map
from vision.data.dataset import Unreadable, class_names
from vision.data.decoding import fitted_size, read_image, read_semantic_map
from vision.data.image_files import listed, natural_key
from vision.data.samplers import Key, seeded
from vision.errors import DataError, printable, run_error
from vision.segmentation.segmenters import IGNORED

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
RETRIES = 10
"""Maximum number of consecutive unusable samples that are skipped before an error is raised."""


@dataclass(frozen=True, slots=True)
class SegmentationData:
    """A training and a validation set of images (C, H, W) with class maps (H, W)."""

    train: Any
    val: Any
    classes: tuple[str, ...]
    shape: tuple[int, int, int]  # shape of a training crop
    unreadable: Unreadable = field(default_factory=Unreadable)


def load_semantic_maps(config: SemanticMapsConfig, seed: int, notes: Path | None = None) -> SegmentationData:
    """Load the data of a configuration.

    Args:
        config: Names the files.
        seed: Seed of the augmentation.
        notes: File to which unusable samples are written.

    Raises:
        revnets.SpecError: If directories are missing or empty, or images and annotations do not match.
    """
    unreadable = Unreadable(notes, config.unreadable)
    train = SemanticMaps(config, config.train_split, unreadable, seed)
    val = SemanticMaps(config, config.val_split, unreadable)
    names = tuple(str(index) for index in range(config.num_classes))
    if config.class_map is not None:
        names = class_names(read_class_map(config.class_map, config.root), None)
        if len(names) != config.num_classes:
            problem = f"{config.class_map} has {len(names)} names for {config.num_classes} classes"
            raise run_error("data.class_map", problem, "Use one name per line", code="class-mismatch")
    shape = (3, config.img_size, config.img_size)
    return SegmentationData(train, val, names, shape, unreadable)


class SemanticMaps(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of a normalized image (3, H, W) and its class map (H, W), in which `IGNORED` does not count.

    A training pair is indexed by `Key` and augmented; an unusable one is replaced by the next. A validation pair is
    indexed by number and keeps the size of its file; an unusable one does not count.

    Args:
        config: Names the files.
        split: Directory name of the split.
        unreadable: Handles unusable pairs.
        seed: Seed of the augmentation; None for validation.

    Raises:
        revnets.SpecError: If directories are missing or empty, or images and annotations do not match.
    """

    def __init__(self, config: SemanticMapsConfig, split: str, unreadable: Unreadable, seed: int | None = None):
        self.config, self.unreadable, self.seed = config, unreadable, seed
        images = _files(Path(config.root) / config.images / split, ENDINGS)
        annotations = _files(Path(config.root) / config.annotations / split, (".png",))
        for ours, theirs, what in ((images, annotations, "annotation"), (annotations, images, "image")):
            if missing := sorted(set(ours) - set(theirs), key=natural_key):
                problem = f"{len(missing)} files of {split} have no {what}: {listed(missing)}"
                hint = "Add the missing files, or remove these"
                raise run_error("data.root", problem, hint, code="misaligned-data")
        self.pairs = [(images[name], annotations[name]) for name in sorted(images, key=natural_key)]
        self.augment = Augmentation(config)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, Tensor]:
        if isinstance(key, int):
            pair = self._read(key)
            if pair is None:
                return torch.zeros(3, 8, 8), torch.full((8, 8), IGNORED)
            return normalized(pair[0], self.config), pair[1]
        for retry in range(RETRIES):
            pair = self._read((key.index + retry) % len(self))
            if pair is not None:
                with seeded(self.seed or 0, *key):
                    return self.augment(*pair)
        name = printable(self.pairs[key.index][0].name)
        raise DataError(f"{RETRIES} consecutive images, starting with {name}, cannot be used. Check data.root")

    def _read(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Read a uint8 image (3, H, W) and its map (H, W). If they are unusable, note it and return None."""
        image_file, map_file = self.pairs[index]
        try:
            with open_regular(image_file) as file:
                image = TF.pil_to_tensor(read_image(file))
            with open_regular(map_file) as file:
                numbers = read_semantic_map(file)
            classes = self._classes(numbers)
            if classes.shape != image.shape[1:]:
                sizes = " and ".join(f"{size[1]} x {size[0]}" for size in (image.shape[1:], classes.shape))
                raise ValueError(f"image and annotation have different sizes: {sizes} pixels")
        except DataError:
            raise
        except Exception as error:  # decoders raise many types
            self.unreadable.note(image_file.name, error)
            return None
        return image, torch.from_numpy(classes)

    def _classes(self, numbers: np.ndarray) -> np.ndarray:
        if self.config.reduce_zero_label:
            numbers = np.where(numbers == 0, IGNORED, np.where(numbers == IGNORED, IGNORED, numbers - 1))
        wrong = (numbers >= self.config.num_classes) & (numbers != IGNORED)
        if wrong.any():
            found = f"class {numbers[wrong][0]}"
            raise ValueError(f"the annotation has {found}, but there are {self.config.num_classes}, numbered from 0")
        return numbers


class Augmentation:
    """The training transforms of the release, in the same order.

    The image is resized by a random factor and cropped. Crops in which one class covers most pixels are drawn again, up
    to ten times. The crop is mirrored, its colors are distorted, and small crops are padded with ignored zeros.
    """

    def __init__(self, config: SemanticMapsConfig):
        self.config = config
        self.colors = PhotometricDistortion(hue=(-0.1, 0.1)) if config.photometric else v2.Identity()

    def __call__(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Augment a uint8 image (3, H, W) and its map (H, W) to crops of `img_size`."""
        config, side = self.config, self.config.img_size
        low, high = config.scale
        factor = low + (high - low) * torch.rand(()).item()
        size = list(fitted_size(image.shape[1:], round(config.short_side * factor), round(config.long_side * factor)))
        image = TF.resize(tv_tensors.Image(image), size, antialias=True)
        classes = TF.resize(tv_tensors.Mask(classes[None]), size)[0]
        image, classes = self._cropped(image, classes)
        if torch.rand(()) < config.hflip:
            image, classes = image.flip(-1), classes.flip(-1)
        crop = normalized(self.colors(tv_tensors.Image(image)), config)
        missing = (0, side - crop.shape[2], 0, side - crop.shape[1])
        padded = torch.nn.functional.pad(crop, missing)
        return padded, torch.nn.functional.pad(classes.as_subclass(Tensor), missing, value=IGNORED).long()

    def _cropped(self, image: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        side = self.config.img_size
        for _ in range(10):
            top, left = (int(torch.randint(max(1, length - side + 1), ())) for length in classes.shape)
            part = classes[top : top + side, left : left + side]
            counts = torch.bincount(part[part != IGNORED].flatten())
            if len(counts.nonzero()) > 1 and counts.max() < self.config.most_of_one_class * counts.sum():
                break
        return image[:, top : top + side, left : left + side], part  # pyright: ignore[reportPossiblyUnboundVariable]


class PhotometricDistortion(v2.RandomPhotometricDistort):
    """torchvision's random brightness, contrast, saturation and hue, without permuted channels."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return super().make_params(flat_inputs) | {"channel_permutation": None}


def normalized(image: Tensor, config: SemanticMapsConfig) -> Tensor:
    """Convert a uint8 image (3, H, W) to normalized float values."""
    return TF.normalize(TF.to_dtype(image.as_subclass(Tensor), scale=True), list(config.mean), list(config.std))


def _files(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """Return the files of a directory by their names without suffix."""
    if not folder.is_dir():
        problem = f"{folder} is not a directory"
        raise run_error("data.root", problem, "Check data.root and the splits", code="missing-file")
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in endings or file.name.startswith("."):
            continue
        if file.stem in found:
            problem = f"{folder} has two files named {file.stem}"
            raise run_error("data.root", problem, "Remove one of them", code="name-clash")
        found[file.stem] = file
    if not found:
        problem = f"{folder} contains no files with the suffixes {' '.join(endings)}"
        raise run_error("data.root", problem, "Check data.root and the splits", code="empty-data")
    return found
