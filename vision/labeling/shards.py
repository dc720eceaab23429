"""Images to label, divided into shards: one per tar, or a number of files of a directory. A shard has a label file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from revnets.config.errors import ConfigError, option_error, show
from vision.data.image_files import ImageFiles
from vision.data.key_lists import MAX_KEY
from vision.pseudo_labels.label_files import MAX_PARTS
from vision.pseudo_labels.targets import listing_digest


@dataclass(frozen=True, slots=True)
class Shard:
    """Images that are labeled together.

    Attributes:
        number: Index of the shard.
        images: Indices in the reader, sorted by key.
    """

    number: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class ShardedImages:
    """All images below a directory or in tars, divided into shards in the order of keys.

    Attributes:
        reader: Of the images.
        shards: All shards.
        digest: sha256 of the keys.
    """

    reader: ImageFiles
    shards: tuple[Shard, ...]
    digest: str

    def key(self, image: int) -> str:
        """The key of an image by its index."""
        return self.reader.filename(image)


def list_shards(data: Path, size: int, endings: str | None = None) -> ShardedImages:
    """List the shards of a tar, a directory of tars, or a directory with images at any depth.

    Args:
        data: Path of the images.
        size: Images per shard of a directory. A tar is one shard.
        endings: Suffixes of the files that are read, such as `.webp;.tif`; by default those of PNG and JPEG.

    Raises:
        revnets.SpecError: If there are no images, a tar or an image in a tar is duplicated, a key is too long, or there
            are too many shards.
    """
    if not data.exists():
        problem = f"there is no file or directory {data}"
        raise option_error("DATA", problem, "Give a directory of images or tars", code="missing-file")
    is_tar = data.is_file() or any(name.lower().endswith(".tar") for name in os.listdir(data))
    try:
        reader = ImageFiles(str(data), str(data), is_tar, endings, has_classes=False)
    except ConfigError as error:
        hint = error.hint.replace("set data.input_key to", "add --input-key")
        raise option_error("DATA", error.message, hint, error.code) from None
    keys = [reader.filename(index) for index in range(len(reader))]
    archives = [os.path.basename(file.archive) for file in reader.files]
    _require_different_tars({file.archive for file in reader.files if file.archive})
    order = sorted(range(len(keys)), key=lambda index: (archives[index] + "/" if is_tar else "", keys[index]))
    for before, after in pairwise(order):
        if keys[before] == keys[after]:
            problem = f"{data} has {keys[after]} twice"
            raise option_error("DATA", problem, "Remove one of them", code="name-clash")
    for key in keys:
        if not key.isprintable() and any(0xD800 <= ord(letter) < 0xE000 for letter in key):
            problem = f"the name {key!r} is not UTF-8"
            raise option_error("DATA", problem, "Rename the file", code="invalid-encoding")
        if len(key) > MAX_KEY:
            problem = f"the name {show(key)} has {len(key)} characters"
            raise option_error("DATA", problem, f"Give names of at most {MAX_KEY}", code="too-large")
    if is_tar:
        names = sorted(set(archives), key=lambda name: name + "/")
        members: dict[str, list[int]] = {name: [] for name in names}
        for index in order:
            members[archives[index]].append(index)
        cuts = list(members.values())
    else:
        cuts = [order[start : start + size] for start in range(0, len(order), size)]
    if len(cuts) > MAX_PARTS:
        problem = f"{len(cuts)} shards are more than the limit of {MAX_PARTS}"
        option, hint = ("DATA", "Give fewer tars") if is_tar else ("--shard-size", "Give a larger number")
        raise option_error(option, problem, hint, code="too-large")
    shards = tuple(Shard(number, tuple(images)) for number, images in enumerate(cuts))
    return ShardedImages(reader, shards, listing_digest(keys))


def _require_different_tars(paths: set[str]) -> None:
    places: dict[tuple[int, int], str] = {}
    for path in sorted(paths):
        status = os.stat(path)
        other = places.setdefault((status.st_dev, status.st_ino), path)
        if other != path:
            problem = f"{path} and {other} are the same file"
            raise option_error("DATA", problem, "Remove one of the links", code="name-clash")
