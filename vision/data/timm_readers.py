"""Images read by timm's readers: directories, tars, data sets of Hugging Face, and streams."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from PIL import Image
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import Dataset

from revnets.config.errors import SpecError
from vision.config.data import ImagesConfig
from vision.data.class_maps import read_class_map
from vision.data.dataset import ImageData, Unreadable, class_names
from vision.data.decoding import Exif, read_image
from vision.data.image_files import ImageFiles, listed
from vision.data.samplers import Key, seeded
from vision.data.shard_names import check_files, check_shards
from vision.data.streaming import Stream, class_of
from vision.data.transforms import Transform, train_transform, val_transform
from vision.distributed.context import World
from vision.errors import DataError, first_line, printable, run_error

RETRIES = 10
"""Consecutive unreadable images that are skipped before training stops."""

LARGEST = 10**6
"""Limit of classes, more than any data set has."""

SYNONYMS = {"train": ("train", "training"), "validation": ("validation", "val", "valid", "eval", "test")}


def load_images(config: ImagesConfig, seed: int, unreadable: Unreadable, world: World) -> ImageData:
    """Open the training and validation set of one of timm's readers.

    Raises:
        revnets.SpecError: If the data is missing or empty, or the classes of both sets differ.
    """
    if config.is_stream:
        val_steps = val_transform(config)
        reader: Any = training_stream(config, unreadable, world, seed)
        val_reader: Any = Stream(lambda: _reader(config, "val", seed), val_steps, unreadable, world, None, config.exif)
    else:
        reader, val_reader = _reader(config, "train", seed), _reader(config, "val", seed)
    left_out = leave_out(reader, config)
    found, others = class_to_idx(reader), class_to_idx(val_reader)
    remarks = [*getattr(reader, "remarks", ()), *getattr(val_reader, "remarks", ()), *left_out]
    if config.class_map is None and found:
        if strange := sorted(set(others) - set(found)):
            noun = "classes" if len(strange) > 1 else "class"
            problem = f"{config.val_split} has the {noun} {listed(strange)}, but {config.train_split} does not"
            raise run_error(
                "data.root", problem, "Give both splits the same classes, or a class_map", code="class-mismatch"
            )
        if others and others != found:  # numbers are given in the order of names
            if config.is_stream:
                problem = f"{config.val_split} numbers its classes differently from {config.train_split}"
                raise run_error("data", problem, "Give a class_map", code="class-mismatch")
            val_reader = _reader(config, "val", seed, found)
    for split, source, names in ((config.train_split, reader, found), (config.val_split, val_reader, others or found)):
        if missing := [name for name in found if name not in getattr(source, "classes", names)]:
            remarks.append(f"{split} has no images of {listed(missing)}")
    classes = _classes(config, found)
    count = len(classes)
    if config.is_stream:
        train, val = reader, val_reader
        train.count = val.count = count
    else:
        train = Images(reader, train_transform(config), unreadable, seed, config.exif, count)
        val = Images(val_reader, val_transform(config), unreadable, None, config.exif, count)
    shape = (3, config.img_size, config.img_size)
    provenance = provenance_of_exclusion(reader, "data")
    return ImageData(train, val, classes, shape, config.mean, config.std, unreadable, tuple(remarks), provenance)


def training_stream(config: ImagesConfig, unreadable: Unreadable, world: World, seed: int) -> Stream:
    """The training set of a data set that is streamed."""
    return Stream(lambda: _reader(config, "train", seed), train_transform(config), unreadable, world, seed, config.exif)


def leave_out(reader: Any, config: ImagesConfig) -> tuple[str, ...]:
    """Remove the images of the key `exclude` from a training set.

    Returns:
        A remark that counts removed images, and keys of the list that match no image; empty without a list.

    Raises:
        revnets.SpecError: If the list cannot be read, or no image remains.
    """
    if config.exclude is None:
        return ()
    from vision.data.key_lists import read_keys  # few runs have a list

    assert isinstance(reader, ImageFiles)  # the configuration allows the key for no other reader
    keys = read_keys(config.exclude)
    reader.leave_out(keys)
    unknown = len(keys) - len(reader.left_out)
    others = f"; {unknown} of its keys match no image" if unknown else ""
    return (f"{config.exclude} excludes {len(reader.left_out)} training images{others}",)


def provenance_of_exclusion(reader: Any, place: str) -> dict[str, Any]:
    """By `PLACE.exclude`, the digest of the keys that `leave_out` has removed; empty if it has removed none."""
    if not getattr(reader, "left_out", ()):
        return {}
    from vision.data.key_lists import listing_digest

    return {f"{place}.exclude": listing_digest(reader.left_out)}


class Images(Dataset[tuple[Tensor, int]]):
    """Images with random access.

    For training they are indexed by `Key`, and an unreadable image is replaced by the next one. For validation they are
    indexed by number, and an unreadable image is black with the class -1, which no evaluation counts.

    Args:
        reader: With timm's interface: `reader[index]` is (file, class number).
        transform: From a PIL image to a tensor.
        unreadable: Policy for images that cannot be read.
        seed: Of the augmentations; None for validation.
        exif: Whether the EXIF orientation is applied.
        count: Number of classes; None if labels are not compared with it.
    """

    def __init__(
        self,
        reader: Any,
        transform: Transform,
        unreadable: Unreadable,
        seed: int | None = None,
        exif: Exif = "ignore",
        count: int | None = None,
    ):
        self.reader, self.transform, self.unreadable, self.seed = reader, transform, unreadable, seed
        self.exif: Exif = exif
        self.count = count

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int]:
        if isinstance(key, int):
            image, label = self.read(key)
            return (self.transform(image), label) if image else (self.transform(Image.new("RGB", (8, 8))), -1)
        for retry in range(RETRIES):
            image, label = self.read((key.index + retry) % len(self))
            if image:
                with seeded(self.seed or 0, *key):
                    return self.transform(image), label
        place = f"starting at number {key.index} ({printable(self.reader.filename(key.index))})"
        raise DataError(f"{RETRIES} consecutive images cannot be read, {place}. Check data.root")

    def read(self, index: int) -> tuple[Image.Image | None, int]:
        """Read an image as RGB, and its class. The image is None, with a note, if it cannot be read.

        Raises:
            DataError: If the class is out of range, or the policy for unreadable images is `stop`.
        """
        try:
            file, label = self.reader[index]
            with file:
                image = read_image(file, exif=self.exif)
            label = -1 if label is None else int(label)
        except Exception as error:  # decoders raise OSError, SyntaxError, DecompressionBombError and others
            self.unreadable.note(self.reader.filename(index), error)
            return None, -1
        return image, class_of(label, self.count, self.reader.filename(index), self.seed is not None)


def _reader(config: ImagesConfig, part: str, seed: int, class_map: dict[str, int] | None = None) -> Any:
    """timm's reader of `train` or `val`."""
    split = config.train_split if part == "train" else config.val_split
    given: dict[str, Any] = {}
    try:
        if config.name in ("folder", "tar"):
            root = str(split_path(Path(config.root or ""), split, config.name))
            if class_map is None and config.class_map is not None:
                class_map = read_class_map(config.class_map, root)
            return ImageFiles(root, split, config.name == "tar", config.input_key, class_map, may_lack=part == "val")
        if class_map is None and config.class_map is not None:
            class_map = read_class_map(config.class_map)
        given |= {"class_map": class_map or None}
        given |= {"input_key": config.input_key, "target_key": config.target_key}
        if config.is_stream:
            samples = config.train_samples if part == "train" else config.val_samples
            given |= {"is_training": part == "train", "seed": seed, "num_samples": samples, "input_img_mode": ""}
        root = config.root
        if config.name.startswith("wds/"):
            _require_folder(Path(root or ""))
            check_shards(Path(root or ""), split)
            root = str(Path(root or "").resolve())  # webdataset would run a name that begins with `pipe:` as a command
        with _without_hub() if config.name.startswith(("hfds/", "hfids/")) else nullcontext():
            reader: Any = create_reader(config.name, root=root, split=split, **given)
        if config.name.startswith("wds/"):
            check_files(Path(root or ""), reader.split_info.filenames)
        return reader
    except ImportError as error:
        problem = f"{config.name} needs a package that is not installed ({error})"
        raise run_error("data.name", problem, "pip install 'revnets[data]'", code="missing-dependency") from None
    except SpecError:
        raise
    except Exception as error:  # readers raise AssertionError, RuntimeError, ValueError and others
        where = f"{config.name} {config.root or ''} {split}".replace("  ", " ")
        remedy = "Check root, splits and keys" + ", or set train_samples and val_samples" * config.is_stream
        raise run_error("data", f"{where}: {first_line(error)}", remedy, code="unreadable-data") from error


@contextmanager
def _without_hub() -> Iterator[None]:
    """Use only local directories and the cache if the host name of the Hugging Face Hub cannot be resolved.

    Its client would otherwise retry every request for 23 seconds.
    """
    from datasets import config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    if not getproxies():  # a proxy resolves the name itself
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, None)
        except OSError:
            constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def split_path(root: Path, split: str, kind: str = "folder") -> Path:
    """The directory (or the tar, or the directory of tars) of a split.

    Raises:
        revnets.SpecError: If it does not exist, or contains no tars.
    """
    _require_folder(root)
    names = dict.fromkeys((split, *SYNONYMS.get(split, ())))
    candidates = [root / (name + ending) for name in names for ending in (("", ".tar") if kind == "tar" else ("",))]
    path = next((path for path in candidates if path.exists()), None)
    if path is None:
        there = ", ".join(sorted(item.name for item in root.iterdir())[:8]) or "nothing"
        problem = f"{root} has none of {', '.join(names)}; it contains {there}"
        raise run_error(
            "data.root", problem, "Use one directory per split, or set train_split and val_split", code="missing-file"
        )
    if kind == "tar" and path.is_dir() and not any(name.lower().endswith(".tar") for name in os.listdir(path)):
        raise run_error("data.root", f"{path} has no tars", "Give a directory with tars", code="empty-data")
    return path


def class_to_idx(reader: Any) -> dict[str, int]:
    """Class numbers by name, if the reader has class names."""
    return dict(getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {})


def _classes(config: ImagesConfig, found: dict[str, int]) -> tuple[str, ...]:
    if not all(isinstance(number, int) and 0 <= number < LARGEST for number in found.values()):
        problem = f"the classes have numbers outside of 0 ... {LARGEST - 1}"
        raise run_error("data.class_map", problem, "Number the classes from 0", code="out-of-range")
    known = max(found.values(), default=-1) + 1
    if config.num_classes is None and not known:
        problem = f"{config.name} does not report the number of classes"
        raise run_error("data.num_classes", problem, "Set the key", code="missing-key")
    if config.num_classes is not None and config.num_classes < known:
        problem = f"{config.num_classes}, but the data has {known} classes"
        raise run_error("data.num_classes", problem, f"Set it to {known} or remove it", code="class-mismatch")
    return class_names(found, config.num_classes)


def _require_folder(root: Path) -> None:
    if not root.is_dir():
        raise run_error("data.root", f"there is no directory {root}", "Check the path", code="missing-file")
