"""Access to labeled images by their keys."""

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
"""Most unreadable images whose names are recorded."""


class Pictures:
    """Images of a directory or of tars that belong to a set of labels.

    Args:
        images: All images.
        exif: Whether their EXIF orientation is applied.

    Attributes:
        unreadable: Keys of images that could not be read, with the reasons, at most `MOST_NOTED`.
    """

    def __init__(self, images: ShardedImages, exif: Exif = "ignore"):
        self.images = images
        self.exif: Exif = exif
        self.numbers = {images.key(number): number for shard in images.shards for number in shard.images}
        self.unreadable: dict[str, str] = {}

    def read(self, key: str) -> Image.Image | None:
        """An image in RGB; None, with a note, if it cannot be read."""
        try:
            if key not in self.numbers:
                raise OSError("there is no such image")
            file, _ = self.images.reader[self.numbers[key]]
            with file, warnings.catch_warnings(action="ignore"):  # Pillow's about large images
                return read_image(file, exif=self.exif)
        except Exception as error:  # decoders raise errors of any type
            if len(self.unreadable) < MOST_NOTED:
                self.unreadable[key] = printable(getattr(error, "strerror", None) or first_line(error))
            return None


def pictures_of(
    labels: LabelFolder, place: Path, option: str, endings: str | None = None, exif: Exif = "ignore"
) -> Pictures:
    """Open the images of a set of labels.

    Args:
        labels: Of the images.
        place: The directory, the tar or the directory of tars that was labeled.
        option: Of the command, for messages.
        endings: Suffixes of the files that were labeled, as for `list_shards`.
        exif: Whether the EXIF orientation is applied.

    Raises:
        revnets.SpecError: If the images do not exist, or are not those that were labeled.
    """
    if not place.exists():
        problem = f"there is no file or directory {place}"
        raise option_error(option, problem, "Give the images that were labeled", code="missing-file")
    images = list_shards(place, size=max(1, labels.rows), endings=endings)
    if images.digest != labels.provenance.data:
        problem = f"{place} has other images than those of the labels in {labels.path}"
        hint = "Give the directory that was labeled, or label it again"
        raise option_error(option, problem, hint, code="misaligned-data")
    return Pictures(images, exif)
