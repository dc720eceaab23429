"""Training and validation sets of images with boxes and masks, read from directories and JSON files in COCO format."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torch.utils.data import Dataset

from revnets.utils.regular_files import open_regular
from vision.config.data import CocoConfig
from vision.data.class_subsets import class_difference
from vision.data.dataset import Unreadable
from vision.data.decoding import read_image, read_semantic_map
from vision.data.samplers import Key, seeded
from vision.detection.augmentation import MultiScaleAugmentation, Target, resized
from vision.detection.average_precision import require_library
from vision.detection.coco_json import CocoAnnotations, CocoImage, CocoObject, read_coco
from vision.detection.instance_masks import dense_mask
from vision.errors import DataError, printable, run_error

RETRIES = 10
"""Maximum number of consecutive unusable images that are skipped before an error is raised."""

MAX_MASKS = 2**29
"""Maximum size of the masks of an image, in bytes."""

NOT_COUNTED = -1
"""`image_id` of an image that the evaluation ignores."""


@dataclass(frozen=True, slots=True)
class DetectionData:
    """A training and a validation set of images (3, H, W) of different sizes, each with a mapping of its objects.

    Attributes:
        classes: Names of the classes; label 1 is the first.
        category_ids: Id of each class in the files.
        annotations: Annotations of the validation set, for the evaluation.
        shape: Shape of the largest batch, per image.
        remarks: Sentences about annotations that were omitted.
    """

    train: Any
    val: Any
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    annotations: CocoAnnotations
    shape: tuple[int, int, int]
    unreadable: Unreadable = field(default_factory=Unreadable)
    remarks: tuple[str, ...] = ()


def load_coco(
    config: CocoConfig, seed: int, notes: Path | None = None, stuff_classes: int | None = None
) -> DetectionData:
    """Load the data of a configuration.

    Args:
        config: Names the files.
        seed: Seed of the augmentation.
        notes: File to which unusable images are written.
        stuff_classes: Number of classes of the semantic maps; None for any number.

    Raises:
        revnets.SpecError: If files or directories are missing or damaged, have different classes, or contain no
            objects.
    """
    require_library()  # fail here, not in the first validation
    unreadable = Unreadable(notes, config.unreadable)
    found = []
    for split in ("train", "val"):
        path, folder = (Path(config.root) / getattr(config, f"{split}_{kind}") for kind in ("annotations", "images"))
        annotations = read_coco(path, f"data.{split}_annotations", config.masks)
        if not folder.is_dir():
            problem = f"{folder} is not a directory"
            raise run_error(f"data.{split}_images", problem, "Check data.root", code="missing-file")
        if not any(_trained_on(image) for image in annotations.images):
            what = "objects with masks" if config.masks else "objects"
            hint = "Set data.masks to false, or check the file" if config.masks else "Check the file"
            raise run_error(f"data.{split}_annotations", f"{path} has no {what}", hint, code="empty-data")
        found.append((annotations, folder))
    (train, train_folder), (val, val_folder) = found
    _require_same_classes(train, val)
    chosen = [image for image in train.images if config.keep_empty or _trained_on(image)]
    maps = None if config.stuff_maps is None else Path(config.root) / config.stuff_maps
    if maps is not None and not maps.is_dir():
        raise run_error("data.stuff_maps", f"{maps} is not a directory", "Check data.root", code="missing-file")
    return DetectionData(
        CocoImages(config, train_folder, chosen, unreadable, seed, maps, stuff_classes),
        CocoImages(config, val_folder, val.images, unreadable),
        train.classes,
        train.category_ids,
        val,
        (3, config.long_side, config.long_side),
        unreadable,
        tuple(remark for remark in (train.remark, val.remark) if remark),
    )


def _require_same_classes(train: CocoAnnotations, val: CocoAnnotations) -> None:
    difference = ""
    if len(train.classes) != len(val.classes):
        difference = f"{len(val.classes)} classes, but {len(train.classes)} in training"
    elif train.category_ids != val.category_ids:
        difference = "category ids differ from those in training"
    elif different := class_difference(train.classes, val.classes):
        difference = different.replace("in the data", "here").replace("in the model", "in training")
    if difference:
        raise run_error("data.val_annotations", difference, "Use files with the same categories", "class-mismatch")


def _trained_on(image: CocoImage) -> list[CocoObject]:
    return [item for item in image.objects if not item.is_crowd]


class CocoImages(Dataset[tuple[Tensor, Target]]):
    """Pairs of a normalized image (3, H, W) and a mapping.

    A training sample is indexed by `Key` and augmented. Its mapping has `boxes` (left, top, right, bottom), `labels`
    from 1, and optional `masks` and `semantic_map`; crowds are omitted. An unusable image is replaced by the next one.
    A validation sample is indexed by number. Its mapping has that number as `image_id` and the `size` (height, width)
    of the file. Unusable images do not count.

    Args:
        config: Configuration of the data.
        folder: Directory of the images.
        images: The images with their objects.
        unreadable: Handles unusable images.
        seed: Seed of the augmentation; None for validation.
        maps: Directory of the semantic maps, if there are any.
        stuff_classes: Number of classes of the maps; None for any number.
    """

    def __init__(
        self,
        config: CocoConfig,
        folder: Path,
        images: list[CocoImage],
        unreadable: Unreadable,
        seed: int | None = None,
        maps: Path | None = None,
        stuff_classes: int | None = None,
    ):
        self.config, self.folder, self.images = config, folder, images
        self.maps, self.stuff_classes = maps, stuff_classes
        self.unreadable, self.seed = unreadable, seed
        self.augment = MultiScaleAugmentation(config)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, Target]:
        if isinstance(key, int):
            return self._for_validation(key)
        for retry in range(RETRIES):
            image = self.images[(key.index + retry) % len(self)]
            try:
                pixels, target = self._pixels(image), self._target(image)
            except DataError:
                raise
            except Exception as error:  # decoders raise many types
                self.unreadable.note(image.file_name, error)
                continue
            with seeded(self.seed or 0, *key):
                return self.augment(pixels, target)
        name = printable(self.images[key.index].file_name)
        raise DataError(f"{RETRIES} consecutive images, starting with {name}, cannot be used. Check data.root")

    def _for_validation(self, index: int) -> tuple[Tensor, Target]:
        image = self.images[index]
        try:
            pixels = resized(self._pixels(image), self.config)
        except DataError:
            raise
        except Exception as error:
            self.unreadable.note(image.file_name, error)
            index, pixels = NOT_COUNTED, torch.zeros(3, 64, 64)
        size = torch.tensor((image.height, image.width))
        return pixels, {"image_id": torch.tensor(index), "size": size}

    def _pixels(self, image: CocoImage) -> Tensor:
        with open_regular(self.folder / image.file_name) as file:
            pixels = TF.pil_to_tensor(read_image(file))
        if pixels.shape[1:] != (image.height, image.width):
            size = f"{pixels.shape[2]} x {pixels.shape[1]}"
            raise ValueError(f"the image is {size} pixels, but {image.width} x {image.height} in its annotations")
        return pixels

    def _target(self, image: CocoImage) -> Target:
        objects = _trained_on(image)
        target = {
            "boxes": torch.tensor([item.box for item in objects], dtype=torch.float32).view(-1, 4),
            "labels": torch.tensor([item.label for item in objects], dtype=torch.int64),
        }
        if self.config.masks:
            if len(objects) * image.height * image.width > MAX_MASKS:
                raise ValueError(f"the masks of its {len(objects)} objects need more than {MAX_MASKS} bytes")
            masks = np.zeros((len(objects), image.height, image.width), np.uint8)
            for mask, item in zip(masks, objects, strict=True):
                if item.segmentation is not None:
                    mask[:] = dense_mask(item.segmentation, image.height, image.width)
            target["masks"] = torch.from_numpy(masks)
        if self.maps is not None:
            target["semantic_map"] = self._map(image, self.maps)
        return target

    def _map(self, image: CocoImage, folder: Path) -> Tensor:
        with open_regular((folder / image.file_name).with_suffix(".png")) as file:
            numbers = read_semantic_map(file)
        if numbers.shape != (image.height, image.width) or numbers.min() < 0 or numbers.max() > 255:
            raise ValueError(f"the semantic map does not have {image.width} x {image.height} values from 0 to 255")
        wrong = (numbers >= (255 if self.stuff_classes is None else self.stuff_classes)) & (numbers != 255)
        if wrong.any():
            found = f"class {numbers[wrong][0]}"
            raise ValueError(f"the semantic map has {found}, but there are {self.stuff_classes}, numbered from 0")
        return torch.from_numpy(numbers.astype(np.uint8))
