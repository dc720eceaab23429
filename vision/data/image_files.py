"""A reader of images in class directories and in tars, and the classes that the directories name."""

from __future__ import annotations

import io
import os
import posixpath
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import IO

from revnets.utils.regular_files import open_regular
from vision.data.listing import ImageFile, Listing, list_folder, list_tars
from vision.errors import comparable, printable, run_error

ENDINGS = (".png", ".jpg", ".jpeg")
"""Suffixes of the files that are read by default, in upper or lower case, as in timm."""


class ImageFiles:
    """A reader with timm's interface: `reader[index]` is (file, class number). Images are in natural order of names.

    Args:
        root: A directory with class directories; with `tars`, a tar with class directories, or a directory of tars.
        name: Of the split, for messages.
        tars: Whether `root` is a tar or a directory of tars.
        endings: Suffixes of the files that are read, such as `.webp;.tif`; by default `ENDINGS`.
        numbers: Classes to read. By default all classes are read, numbered in the natural order of their names.
        may_lack: Whether classes may have no images, as in a validation set.
        has_classes: Whether directories are classes. Otherwise images may be in any directory and have the class -1.

    Attributes:
        class_to_idx: Numbers of the classes by name.
        left_out: Keys of the images that `leave_out` has removed.
        remarks: Warnings, one line each.

    Raises:
        revnets.SpecError: If there are no images, or the directories do not name classes unambiguously.
    """

    def __init__(
        self,
        root: str,
        name: str,
        tars: bool = False,
        endings: str | None = None,
        numbers: Mapping[str, int] | None = None,
        may_lack: bool = False,
        has_classes: bool = True,
    ):
        self.root = root
        self.left_out: frozenset[str] = frozenset()
        found = (list_tars if tars else list_folder)(root, _endings(endings))
        found.files.sort(key=lambda file: (natural_key(file.name), file))
        found.unread.sort()
        _require_images(root, found)
        if not has_classes:
            self.class_to_idx: dict[str, int] = {}
            self.files, self.targets, self.classes = found.files, [-1] * len(found.files), set[str]()
            self.remarks = _remarks(name, found, (), {})
            return
        if numbers is None:
            _require_clear_classes(root, found)
            if not may_lack:
                _require_no_empty_class(root, found)
        classes = {folder: comparable(posixpath.basename(folder)) for folder in {file.folder for file in found.files}}
        self.class_to_idx = numbered(classes.values()) if numbers is None else dict(numbers)
        self.files = [file for file in found.files if classes[file.folder] in self.class_to_idx]
        self.targets = [self.class_to_idx[classes[file.folder]] for file in self.files]
        self.classes = set(classes.values())  # with images
        self.remarks = _remarks(name, found, self.classes, self.class_to_idx)
        if not self.files:
            problem = f"{root} has no images of the classes in data.class_map"
            raise run_error(
                "data.class_map", problem, "List the names of the class directories, one per line", code="empty-data"
            )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        return open_listed(self.root, self.files[index]), self.targets[index]

    def leave_out(self, keys: frozenset[str]) -> None:
        """Remove the images with these keys.

        Raises:
            revnets.SpecError: If no image remains.
        """
        names = [self.filename(index) for index in range(len(self))]
        kept = [index for index, name in enumerate(names) if name not in keys]
        if not kept:
            problem = f"all images of {self.root} are excluded"
            raise run_error("data.exclude", problem, "Check the list", code="empty-data")
        self.left_out = keys.intersection(names)
        self.files, self.targets = [self.files[index] for index in kept], [self.targets[index] for index in kept]

    def filename(self, index: int) -> str:
        """The key of an image: its path below `root`, or the name of its tar and its path in the tar."""
        file = self.files[index]
        return f"{os.path.basename(file.archive)}/{file.name}" if file.archive else file.name


def open_listed(root: str, file: ImageFile) -> IO[bytes]:
    """Open an image.

    Args:
        root: The directory that was listed.

    Raises:
        OSError: If the file does not exist, or its tar does not contain its bytes.
    """
    if not file.archive:
        return open_regular(os.path.join(root, file.name))
    if file.start < 0:
        raise OSError("the tar does not contain its bytes")
    with open_regular(file.archive) as archive:
        archive.seek(file.start)
        return io.BytesIO(archive.read(file.size))


class NumberedFiles:
    """Some files of a reader, with their index in the reader instead of their class."""

    def __init__(self, reader: ImageFiles, numbers: Sequence[int]):
        self.reader, self.numbers = reader, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        number = int(self.numbers[index])
        return self.reader[number][0], number

    def filename(self, index: int) -> str:
        return self.reader.filename(int(self.numbers[index]))


def natural_key(text: str) -> list[str | int]:
    """Sort key that puts x2 before x10 and a before B, as in timm."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)]


def numbered(names: Iterable[str]) -> dict[str, int]:
    """Number classes in the natural order of their names. Names that differ only in case have a fixed order."""
    return {name: number for number, name in enumerate(sorted(set(names), key=lambda name: (natural_key(name), name)))}


def listed(names: Sequence[str]) -> str:
    """The first three names and the number of others, for messages."""
    return ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)


def _endings(text: str | None) -> frozenset[str]:
    given = [ending.strip().lower() for ending in (text or "").split(";")]
    return frozenset(ending if ending.startswith(".") else f".{ending}" for ending in given if ending) or frozenset(
        ENDINGS
    )


def _require_images(root: str, found: Listing) -> None:
    if not found.files:
        other = f", but {len(found.unread)} with other suffixes, such as {found.unread[0]}" if found.unread else ""
        problem = f"{root} has no images with the suffixes {' '.join(sorted(found.endings))}{other}"
        raise run_error("data.root", problem, _about_endings(found) or "Check the path", code="empty-data")


def _require_clear_classes(root: str, found: Listing) -> None:
    """Refuse images next to class directories, and directories of one name in different places."""
    hint = "Move {} into class directories, or list the class directories in data.class_map"
    example = {file.folder: file.name for file in reversed(found.files)}
    places: dict[str, str] = {}
    for folder in sorted(example):
        for above in _above(folder):
            if above in example:
                problem = f"{root}: {example[above]} is next to the directory {folder}, which also has images"
                raise run_error("data.root", problem, hint.format("all images"), code="class-mismatch")
        inner = folder.partition("/")[2] or folder if found.tars else folder
        other = places.setdefault(comparable(posixpath.basename(folder)), inner)
        if other != inner:
            problem = f"{root}: {other} and {inner} have the same name, so they would be one class"
            raise run_error("data.root", problem, "Rename one, or use data.class_map", code="class-mismatch")


def _require_no_empty_class(root: str, found: Listing) -> None:
    """Refuse an empty class directory: its class would be missing, and later classes would be renumbered."""
    holding = {file.folder for file in found.files}
    filled = holding.union(*map(_above, holding))
    for folder in sorted(found.folders):
        if folder not in filled and posixpath.dirname(folder) not in holding:
            own = [name for name in found.unread if name.startswith(f"{folder}/")]
            other = f", but {len(own)} with other suffixes, such as {own[0]}" if own else ""
            problem = f"{root}: {folder} has no images with the suffixes {' '.join(sorted(found.endings))}{other}"
            hint = "Remove it, or list the classes to read in data.class_map"
            raise run_error("data.root", problem, _about_endings(found) if own else hint, code="empty-data")


def _remarks(split: str, found: Listing, classes: Collection[str], numbers: Mapping[str, int]) -> list[str]:
    remarks = []
    if found.unread:
        count, example = len(found.unread), printable(found.unread[0])
        remarks.append(f"{split}: {count} images are not read, such as {example}. {_about_endings(found)}")
    if omitted := sorted(set(classes) - set(numbers)):
        remarks.append(f"{split}: data.class_map omits the images of {listed([name or '.' for name in omitted])}")
    return remarks


def _about_endings(found: Listing) -> str:
    if not found.unread:
        return ""
    others = {os.path.splitext(name)[1].lower() for name in found.unread}
    return f'To read them, set data.input_key to "{";".join(sorted(found.endings | others))}"'


def _above(folder: str) -> list[str]:
    """The parents of a directory, including the listed one (an empty name)."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in range(len(parts))]
