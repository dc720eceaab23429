"""Reading and validation of JSON files in COCO format (images, annotations, categories)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from revnets.config.errors import show
from revnets.utils.regular_files import read_regular
from vision.detection.instance_masks import MaskError, Segmentation, parse_segmentation
from vision.errors import comparable, first_line, run_error

MAX_BYTES = 2**34
"""Maximum size of a file. The largest public one, of Objects365, has 6 GB."""

MAX_SIDE = 2**16
"""Maximum length of a side of an image in pixels."""

MAX_ID = 2**40

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class CocoObject:
    """An object in an image.

    Attributes:
        label: Number of the class, from 1.
        box: Left, top, right, bottom in pixels, clipped to the image.
        written_box: Left, top, width, height as in the file, for the evaluation.
        area: Area of the mask, which decides whether the evaluation counts it as small, medium or large.
        is_crowd: Whether it is a group, which is not trained on and never counts as missed.
        segmentation: The mask; None if there is none or masks are not read.
    """

    label: int
    box: Box
    written_box: Box
    area: float
    is_crowd: bool
    segmentation: Segmentation | None


@dataclass(frozen=True, slots=True)
class CocoImage:
    """An image with its objects.

    Attributes:
        number: Its `id` in the file.
    """

    number: int
    file_name: str
    height: int
    width: int
    objects: list[CocoObject] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CocoAnnotations:
    """The content of a file.

    Attributes:
        images: In the order of the file.
        classes: Names, ordered by id; label 1 is the first.
        category_ids: The `id` of every class. They need not be consecutive.
        remark: How many annotations were omitted, and why; empty if none were.
    """

    images: list[CocoImage]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    remark: str


def read_coco(path: Path, key: str = "data.root", with_masks: bool = True) -> CocoAnnotations:
    """Read and validate a JSON file in COCO format.

    Unusable annotations are omitted and counted: those of images or categories that are not listed, with boxes that
    have no area in the image, with damaged masks or masks of another size, or without a mask if masks are read.

    Args:
        path: The file.
        key: Configuration key for error messages.
        with_masks: Whether to read masks and omit objects without one.

    Raises:
        revnets.SpecError: If the file cannot be read, is not in COCO format, or has values of wrong types.
    """
    content = _Content(path, key)
    data = content.load()
    classes, category_ids = _categories(content, data)
    labels = {number: label for label, number in enumerate(category_ids, 1)}
    images = _images(content, data)
    omitted: Counter[str] = Counter()
    for index, item in enumerate(content.list_in(data, "annotations")):
        place = f"annotations[{index}]"
        if not isinstance(item, dict):
            content.refuse(f"{place} is {show(item)}, not a mapping")
        image = images.get(content.integer(item, "image_id", place))
        label = labels.get(content.integer(item, "category_id", place))
        if image is None or label is None:
            omitted[f"of {'images' if image is None else 'categories'} that are not listed"] += 1
            continue
        found = _object(content, item, place, image, label, with_masks)
        if isinstance(found, str):
            omitted[found] += 1
        else:
            image.objects.append(found)
    reasons = ", ".join(f"{count} {reason}" for reason, count in omitted.most_common())
    remark = f"{path}: {omitted.total()} annotations are omitted: {reasons}" if omitted else ""
    return CocoAnnotations(list(images.values()), classes, category_ids, remark)


class _Content:
    """The content of a file. Its methods return values of the expected types or raise an error that names them."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def load(self) -> dict[str, Any]:
        try:
            text = read_regular(self.path, MAX_BYTES)
        except FileNotFoundError:
            problem = f"{self.path} does not exist"
            raise run_error(self.key, problem, "Check data.root and the file names", "missing-file") from None
        except OSError as error:
            problem = f"{self.path} cannot be read ({error.strerror or first_line(error)})"
            raise run_error(self.key, problem, "Check the path", code="unreadable-file") from None
        try:
            data = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            problem = f"{self.path} is not a JSON file ({first_line(error)})"
            raise run_error(self.key, problem, "Download it again", code="damaged-file") from None
        if not isinstance(data, dict):
            self.refuse("the file does not contain a mapping")
        return data

    def refuse(self, problem: str, code: str = "wrong-format") -> NoReturn:
        """Raise an error about the file."""
        raise run_error(self.key, f"{self.path}: {problem}", "See docs/guides/detection.md", code=code)

    def list_in(self, data: dict[str, Any], name: str) -> list[Any]:
        if not isinstance(data.get(name), list):
            self.refuse(f"the file has no list {name!r}")
        return data[name]

    def integer(self, item: dict[str, Any], name: str, place: str) -> int:
        value = item.get(name)
        if type(value) is int and 0 <= value <= MAX_ID:
            return value
        self.refuse(f"{place}.{name} is {show(value)}, not an integer" if name in item else f"{place} has no {name}")


def _categories(content: _Content, data: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    names: dict[int, str] = {}
    seen: set[str] = set()
    for index, item in enumerate(content.list_in(data, "categories")):
        place = f"categories[{index}]"
        if not isinstance(item, dict) or not isinstance(item.get("name"), str):
            content.refuse(f"{place} has no name")
        number = content.integer(item, "id", place)
        if number in names:
            content.refuse(f"{place} has the id {number} of another category", "name-clash")
        name = comparable(item["name"])
        if name in seen:
            content.refuse(f"{place} has the name {show(name)} of another category", "name-clash")
        seen.add(name)
        names[number] = name
    if not 1 <= len(names) <= 2**16:
        content.refuse(f"the file has {len(names)} categories", "empty-data" if not names else "too-large")
    numbers = tuple(sorted(names))
    return tuple(names[number] for number in numbers), numbers


def _images(content: _Content, data: dict[str, Any]) -> dict[int, CocoImage]:
    images: dict[int, CocoImage] = {}
    for index, item in enumerate(content.list_in(data, "images")):
        place = f"images[{index}]"
        if not isinstance(item, dict) or not isinstance(item.get("file_name"), str):
            content.refuse(f"{place} has no file_name")
        number, name = content.integer(item, "id", place), item["file_name"]
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            content.refuse(f"{place}.file_name is {show(name)}, not a path within a directory", "invalid-value")
        height, width = (content.integer(item, side, place) for side in ("height", "width"))
        if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
            content.refuse(f"{place} is {width} x {height} pixels", "out-of-range")
        if number in images:
            content.refuse(f"{place} has the id {number} of another image", "name-clash")
        images[number] = CocoImage(number, name, height, width)
    return images


def _object(
    content: _Content, item: dict[str, Any], place: str, image: CocoImage, label: int, with_masks: bool
) -> CocoObject | str:
    """Return the object of an annotation, or the reason to omit it."""
    box = item.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        content.refuse(f"{place}.bbox is {show(box)}, not four numbers: left, top, width, height")
    left, top, width, height = map(float, box)
    clipped = max(left, 0.0), max(top, 0.0), min(left + width, image.width), min(top + height, image.height)
    if not (width > 0 and height > 0 and clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        return "with boxes that have no area in the image"
    if item.get("iscrowd", 0) not in (0, 1):
        content.refuse(f"{place}.iscrowd is {show(item['iscrowd'])}, not 0 or 1")
    area = item.get("area", width * height)
    if not _is_number(area) or area < 0:
        content.refuse(f"{place}.area is {show(area)}, not a number of pixels")
    segmentation = None
    if with_masks:
        try:
            segmentation = parse_segmentation(item.get("segmentation"), image.height, image.width)
        except MaskError as error:
            return f"with {error}"
        if segmentation is None:
            return "without a mask"
    is_crowd = bool(item.get("iscrowd", 0))
    return CocoObject(label, clipped, (left, top, width, height), float(area), is_crowd, segmentation)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"it has the value {text}")
