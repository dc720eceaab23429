"""The images that are labeled, cut into shards: a tar each, or as many files of a folder. A shard makes one file."""

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
        number: among the shards, from 0 on.
        images: their numbers in the reader, sorted by key.
    """

    number: int
    images: tuple[int, ...]


@dataclass(frozen=True)
class ShardedImages:
    """All images below a folder or in tars, and their shards; keys rise from shard to shard.

    Attributes:
        digest: sha256 of the keys.
    """

    reader: ImageFiles
    shards: tuple[Shard, ...]
    digest: str

    def key(self, image: int) -> str:
        """The key of an image, by its number."""
        return self.reader.filename(image)


def list_shards(data: Path, size: int, endings: str | None = None) -> ShardedImages:
    """The shards of a tar, a folder of tars, or a folder with images at any depth.

    Args:
        size: images of a shard of a folder; a tar is one shard.
        endings: of the files that are read, such as `.webp;.tif`; by default those of PNG and JPEG.

    Raises:
        revnets.SpecError: there are no images, a tar, or an image in a tar, is there twice, a key is too long, or
            there are too many shards.
    """
    if not data.exists():
        raise option_error("DATA", f"there is no {data}", "Give a folder of images or tars", code="missing-file")
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
            problem = f"{data} holds {keys[after]} twice"
            raise option_error("DATA", problem, "Remove one", code="name-clash")
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
        problem = f"{len(cuts)} shards are more than the {MAX_PARTS} that a set of labels may have"
        option, remedy = ("DATA", "Give fewer tars") if is_tar else ("--shard-size", "Give more images a shard")
        raise option_error(option, problem, remedy, code="too-large")
    shards = tuple(Shard(number, tuple(images)) for number, images in enumerate(cuts))
    return ShardedImages(reader, shards, listing_digest(keys))


def _require_different_tars(paths: set[str]) -> None:
    places: dict[tuple[int, int], str] = {}
    for path in sorted(paths):
        status = os.stat(path)
        other = places.setdefault((status.st_dev, status.st_ino), path)
        if other != path:
            problem = f"{path} and {other} are one file"
            raise option_error("DATA", problem, "Remove one of the links", code="name-clash")
