"""The pictures of labeled images, by their keys."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from revnets.config.errors import option_error
from vision.data.decoding import Exif, read_image
from vision.errors import first_line, printable
from vision.labeling.shards import ShardedImages, list_shards
from vision.pseudo_labels.label_files import LabelFolder

MOST_NOTED = 10**4
"""Unreadable images whose names are kept."""


class Pictures:
    """Pictures of a folder or of tars that belong to a set of labels.

    Args:
        images: all that there are.
        exif: is their EXIF orientation applied?

    Attributes:
        unreadable: keys of images that could not be read, and why, at most `MOST_NOTED`.
    """

    def __init__(self, images: ShardedImages, exif: Exif = "ignore"):
        self.images = images
        self.exif: Exif = exif
        self.numbers = {images.key(number): number for shard in images.shards for number in shard.images}
        self.unreadable: dict[str, str] = {}

    def read(self, key: str) -> Image.Image | None:
        """A picture in RGB, or None if it cannot be read, which is noted."""
        try:
            if key not in self.numbers:
                raise OSError("there is no such image")
            file, _ = self.images.reader[self.numbers[key]]
            with file, warnings.catch_warnings(action="ignore"):  # Pillow's about large pictures
                return read_image(file, exif=self.exif)
        except Exception as error:  # decoders raise whatever they like
            if len(self.unreadable) < MOST_NOTED:
                self.unreadable[key] = printable(getattr(error, "strerror", None) or first_line(error))
            return None


def pictures_of(
    labels: LabelFolder, place: Path, option: str, endings: str | None = None, exif: Exif = "ignore"
) -> Pictures:
    """The pictures that a set of labels is about.

    Args:
        place: the folder, the tar or the folder of tars that was labeled.
        option: of the command, for messages.
        endings: of the files that were labeled, as for `list_shards`.

    Raises:
        revnets.SpecError: there are none, or they are others than those that were labeled.
    """
    if not place.exists():
        raise option_error(option, f"there is no {place}", "Give the images that were labeled", code="missing-file")
    images = list_shards(place, size=max(1, labels.rows), endings=endings)
    if images.digest != labels.provenance.data:
        problem = f"{place} has other images than those that {labels.path} is about"
        remedy = "Give the folder that was labeled, or label it again"
        raise option_error(option, problem, remedy, code="misaligned-data")
    return Pictures(images, exif)
