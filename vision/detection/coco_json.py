"""The json files of COCO (images, annotations, categories), checked before anything is made of them."""

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
"""Objects365, the largest public file, has 6 GB."""

MAX_SIDE = 2**16
"""Pixels along a side of an image."""

MAX_ID = 2**40

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class CocoObject:
    """An object in an image.

    Attributes:
        label: number of its class, from 1.
        box: left, top, right, bottom within the image, pixels.
        written_box: left, top, width, height as the file has them, for the evaluation.
        area: of its mask, by which evaluation calls it small, medium or large.
        is_crowd: a group, which neither counts as missed nor is trained on.
        segmentation: its mask; None without one, or if masks are not read.
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
        number: its `id` in the file.
    """

    number: int
    file_name: str
    height: int
    width: int
    objects: list[CocoObject] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class CocoAnnotations:
    """What a file says.

    Attributes:
        images: in the order of the file.
        classes: names by the order of their ids; label 1 is the first.
        category_ids: the `id` of every class; there may be holes between them.
        remark: how many annotations were left out, and why; empty if none were.
    """

    images: list[CocoImage]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    remark: str


def read_coco(path: Path, key: str = "data.root", with_masks: bool = True) -> CocoAnnotations:
    """Read and check a json file of COCO's format.

    Annotations that do no harm to others are left out and counted: of images or categories that are not listed, with
    boxes of no area in the image, with damaged masks or masks of another size, or without a mask where one is needed.

    Args:
        key: of the run, for error messages.
        with_masks: masks are read, and objects without one left out.

    Raises:
        revnets.SpecError: it cannot be read, is no such file, or has values of other types than it must.
    """
    content = _Content(path, key)
    data = content.load()
    classes, category_ids = _categories(content, data)
    labels = {number: label for label, number in enumerate(category_ids, 1)}
    images = _images(content, data)
    left_out: Counter[str] = Counter()
    for index, item in enumerate(content.list_in(data, "annotations")):
        place = f"annotations[{index}]"
        if not isinstance(item, dict):
            content.refuse(f"{place} is {show(item)}, not a mapping")
        image = images.get(content.integer(item, "image_id", place))
        label = labels.get(content.integer(item, "category_id", place))
        if image is None or label is None:
            left_out[f"of {'images' if image is None else 'categories'} that are not listed"] += 1
            continue
        found = _object(content, item, place, image, label, with_masks)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            image.objects.append(found)
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    remark = f"{path}: {left_out.total()} annotations are left out: {reasons}" if left_out else ""
    return CocoAnnotations(list(images.values()), classes, category_ids, remark)


class _Content:
    """The file as it is read; its methods give values of the right types or say which ones are not."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def load(self) -> dict[str, Any]:
        try:
            text = read_regular(self.path, MAX_BYTES)
        except FileNotFoundError:
            problem = f"{self.path} does not exist"
            raise run_error(self.key, problem, "Check data.root and the names of files", "missing-file") from None
        except OSError as error:
            problem = f"{self.path} cannot be read ({error.strerror or first_line(error)})"
            raise run_error(self.key, problem, "Check the path", code="unreadable-file") from None
        try:
            data = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            problem = f"{self.path} is no json file ({first_line(error)})"
            raise run_error(self.key, problem, "Fetch it again", code="damaged-file") from None
        if not isinstance(data, dict):
            self.refuse("it holds no mapping")
        return data

    def refuse(self, problem: str, code: str = "wrong-format") -> NoReturn:
        """Raise an error about the file."""
        raise run_error(self.key, f"{self.path}: {problem}", "See docs/guides/detection.md", code=code)

    def list_in(self, data: dict[str, Any], name: str) -> list[Any]:
        if not isinstance(data.get(name), list):
            self.refuse(f"it has no list {name!r}")
        return data[name]

    def integer(self, item: dict[str, Any], name: str, place: str) -> int:
        value = item.get(name)
        if type(value) is int and 0 <= value <= MAX_ID:
            return value
        self.refuse(
            f"{place}.{name} is {show(value)}, not a whole number" if name in item else f"{place} has no {name}"
        )


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
        content.refuse(f"it has {len(names)} categories", "empty-data" if not names else "too-large")
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
            content.refuse(f"{place}.file_name is {show(name)}, which is no path within a folder", "invalid-value")
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
    """The object of an annotation, or why it is left out."""
    box = item.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        content.refuse(f"{place}.bbox is {show(box)}, not four numbers: left, top, width, height")
    left, top, width, height = map(float, box)
    clipped = max(left, 0.0), max(top, 0.0), min(left + width, image.width), min(top + height, image.height)
    if not (width > 0 and height > 0 and clipped[0] < clipped[2] and clipped[1] < clipped[3]):
        return "with boxes of no area in the image"
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
