"""Tiles of aerial images, from an image and annotations that the test makes."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import typer
from PIL import Image

pytest.importorskip("faster_coco_eval")

from tests.support.paths import ROOT
from vision.config.run import load_config
from vision.data.samplers import Key
from vision.detection.coco_data import load_coco
from vision.detection.coco_json import read_coco

SIZE = 523, 641  # height and width, primes
BOXES = [(3, 5, 40, 47), (250, 250, 290, 283), (600, 500, 641, 523), (300, 10, 331, 59)]
"""The second is on the corner of four tiles, the third outside of all validation tiles."""


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples/scenes")
    return importlib.import_module("make_trees")


@pytest.fixture
def source(module, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
    for name in module.FILES.values():
        Image.fromarray(pixels).save(folder / f"{name}.png")
        annotate(folder / f"{name}.xml", BOXES)
    return folder


def annotate(path, boxes):
    keys = ("xmin", "ymin", "xmax", "ymax")
    items = ["".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True)) for box in boxes]
    objects = "".join(f"<object><name>Tree</name><bndbox>{item}</bndbox></object>" for item in items)
    path.write_text(f"<annotation>{objects}</annotation>")


def visible_boxes(module, top, left):
    """The boxes of a tile, from masks of pixels instead of corners."""
    found = []
    for x0, y0, x1, y1 in BOXES:
        mask = np.zeros(SIZE, bool)
        mask[y0:y1, x0:x1] = True
        part = mask[top : top + module.TILE, left : left + module.TILE]
        if part.sum() >= module.VISIBLE * mask.sum():
            rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
            found.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    return found


@pytest.mark.parametrize("split", ["training", "validation"])
def test_boxes_are_clipped_to_tiles(module, source, tmp_path, split):
    module.make(tmp_path / "trees", source)
    read = read_coco(tmp_path / f"trees/instances_{split}.json", with_masks=False)
    for image in read.images:
        top, left = map(int, image.file_name.removesuffix(".png").split("_"))
        assert [tuple(item.box) for item in image.objects] == visible_boxes(module, top, left)


def test_training_tiles_without_boxes_are_omitted(module, source, tmp_path):
    module.make(tmp_path / "trees", source)
    starts = [range(0, size - module.TILE + 1, module.STRIDE["training"]) for size in SIZE]
    names = {f"{top:05}_{left:05}.png" for top in starts[0] for left in starts[1] if visible_boxes(module, top, left)}
    assert {path.name for path in (tmp_path / "trees/images/training").iterdir()} == names


def test_tiles_show_the_pixels_of_the_image(module, source, tmp_path):
    module.make(tmp_path / "trees", source)
    whole = np.asarray(Image.open(source / f"{module.FILES['validation']}.png"))
    tile = np.asarray(Image.open(tmp_path / "trees/images/validation/00256_00256.png"))
    assert np.array_equal(tile, whole[256:512, 256:512])


@pytest.mark.parametrize("box", [(-1, 5, 40, 47), (3, 5, 3, 47), (3, 5, 642, 47), (3, 5, 40, 524)])
def test_a_box_outside_the_image_is_refused(module, source, tmp_path, box):
    annotate(source / f"{module.FILES['training']}.xml", [box])
    with pytest.raises(SystemExit):
        module.make(tmp_path / "trees", source)
    assert not (tmp_path / "trees").exists()


@pytest.mark.parametrize("text", ["<annotation>", "<a><bndbox><xmin>1</xmin></bndbox></a>"])
def test_malformed_annotations_are_refused(module, source, tmp_path, text):
    (source / f"{module.FILES['training']}.xml").write_text(text)
    with pytest.raises(SystemExit):
        module.make(tmp_path / "trees", source)


def test_annotations_are_bounded(module, source, tmp_path):
    (source / f"{module.FILES['training']}.xml").write_text(" " * (module.MAX_BYTES + 1))
    with pytest.raises(SystemExit):
        module.make(tmp_path / "trees", source)


@pytest.mark.parametrize("damage", ["truncated", "small"])
def test_an_unusable_image_is_refused(module, source, tmp_path, damage):
    path = source / f"{module.FILES['training']}.png"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:999])
    else:
        Image.new("RGB", (641, module.TILE - 1)).save(path)
        annotate(path.with_suffix(".xml"), BOXES[:1])
    with pytest.raises(SystemExit, match=path.stem):
        module.make(tmp_path / "trees", source)
    assert not (tmp_path / "trees").exists()


def test_a_missing_image_is_named(module, source, tmp_path):
    (source / f"{module.FILES['validation']}.png").unlink()
    with pytest.raises(SystemExit, match=module.FILES["validation"]):
        module.make(tmp_path / "trees", source)


def test_a_directory_is_not_replaced(module, source, tmp_path):
    (tmp_path / "trees").mkdir()
    with pytest.raises(typer.BadParameter):
        module.make(tmp_path / "trees", source)


def test_the_configuration_reads_the_tiles(module, source, tmp_path):
    module.make(tmp_path / "trees", source)
    config = load_config(str(ROOT / "examples/scenes/trees.yaml"), [f"data.root={tmp_path / 'trees'}"])
    data = load_coco(config.data, 0)
    _, target = data.train[Key(0, 0)]
    assert data.classes == ("tree",)
    assert len(target["boxes"])
    assert "masks" not in target
