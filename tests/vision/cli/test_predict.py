"""`revnets predict` for detectors, segmenters and classifiers."""

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image

pytest.importorskip("faster_coco_eval")

from tests.support import coco_files
from tests.support.errors import raises_error
from vision.cli.predict import predict_files
from vision.config.run import load_config
from vision.detection.coco_json import read_coco
from vision.training.drawing import draw_classes, draw_detections, enlargement
from vision.training.trainer import Trainer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return coco_files.make_files(tmp_path_factory.mktemp("coco"), train=2, val=2)


@pytest.fixture(scope="module")
def detector(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "detector"
    run = {"model": {"timm": "test_revcol"}, "task": "tests.support.coco_files:SmallMaskRCNN", "epochs": 1}
    run |= {"data": coco_files.values(root), "batch_size": 2, "output": str(output), "device": "cpu"}
    Trainer(load_config(run)).fit()
    return output


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "classifier"
    level = {"dim": 4, "depth": 1, "block": "convnext"}
    model = {"columns": 2, "stem": {"type": "patchify", "in_chans": 1, "patch": 2}, "levels": [level, level]}
    run = {"model": {**model, "head": {"type": "classifier", "num_classes": 10}}, "output": str(output), "epochs": 1}
    Trainer(load_config({**run, "data": {"name": "digits", "img_size": 8}, "device": "cpu"})).fit()
    return output


def predict(run, images, output, **options):
    return predict_files(run, images, output, device="cpu", trust=True, **options)


def test_detections_are_written_as_coco_json_and_drawings(root, detector, tmp_path):
    files = [root / "val2017/0.png", root / "val2017/1.png"]
    found = predict(detector, files, tmp_path / "out")
    annotations = read_coco(tmp_path / "out/predictions.json")
    assert annotations.category_ids == (3, 7)
    assert annotations.classes == ("red", "green")
    assert [image.file_name for image in annotations.images] == ["0.png", "1.png"]
    assert [(image.height, image.width) for image in annotations.images] == [(48, 64)] * 2
    rows = json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]
    assert len(rows) == sum(len(item.annotations) for item in found) > 0
    assert all(0 <= row["score"] <= 1 and len(row["bbox"]) == 4 for row in rows)
    with Image.open(tmp_path / "out/0.png") as drawn, Image.open(files[0]) as original:
        assert drawn.size == tuple(side * enlargement(original) for side in original.size)


def test_unreadable_images_are_skipped_and_named(root, detector, tmp_path, capsys):
    (tmp_path / "empty.jpg").write_bytes(b"")
    files = [tmp_path / "empty.jpg", root / "val2017/0.png", tmp_path / "missing.jpg"]
    with pytest.raises(typer.Exit) as caught:
        predict(detector, files, tmp_path / "out")
    assert caught.value.exit_code == 1
    printed = capsys.readouterr()
    assert "empty.jpg: cannot be read" in printed.out
    assert "missing.jpg: cannot be read" in printed.out
    assert "2 of 3" in printed.err
    assert len(read_coco(tmp_path / "out/predictions.json", with_masks=False).images) == 1


def test_no_file_is_replaced(root, detector, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.open(root / "val2017/0.png").save(folder / "0.png")
    with raises_error(code="file-exists", key="--output", names="0.png"):
        predict(detector, [folder / "0.png"], folder)


def test_images_of_the_same_name_are_refused(root, detector, tmp_path):
    with raises_error(code="name-clash", key="--output", names="0.png"):
        predict(detector, [root / "val2017/0.png", root / "train2017/0.png"], tmp_path / "out")


def test_a_detector_needs_an_output_directory(root, detector):
    with raises_error(code="missing-key", key="--output"):
        predict(detector, [root / "val2017/0.png"], None)


def test_the_output_must_be_a_directory(root, detector):
    with raises_error(code="not-a-folder", key="--output"):
        predict(detector, [root / "val2017/0.png"], root / "val2017/1.png")


def test_classes_of_images_are_printed(classifier, root, tmp_path, capsys):
    (found,) = predict(classifier, [root / "val2017/0.png"], tmp_path / "out")
    assert len(found.scores) == 5
    assert list(found.scores.values()) == sorted(found.scores.values(), reverse=True)
    assert next(iter(found.scores)) in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.json"]


def segmenter(tmp_path):
    for folder in ("images", "annotations"):
        for split in ("training", "validation"):
            (tmp_path / folder / split).mkdir(parents=True)
            for number in range(2):
                pixels = np.full((48, 64, 3) if folder == "images" else (48, 64), number, np.uint8)
                Image.fromarray(pixels).save(tmp_path / folder / split / f"{number}.png")
    data = {"name": "semantic_maps", "root": str(tmp_path), "num_classes": 2, "img_size": 32, "short_side": 48}
    task = {"type": "semantic_segmentation", "options": {"channels": 8, "auxiliary_channels": 8}}
    run = {"model": {"timm": "test_revcol"}, "task": task, "data": {**data, "long_side": 64}, "batch_size": 2}
    Trainer(load_config({**run, "epochs": 1, "output": str(tmp_path / "run"), "device": "cpu"})).fit()
    return tmp_path / "run"


def test_semantic_maps_are_drawn_next_to_a_legend(tmp_path):
    pytest.importorskip("transformers")
    run = segmenter(tmp_path)
    predict(run, [tmp_path / "images/validation/1.png"], tmp_path / "out")
    with Image.open(tmp_path / "out/1.png") as drawn:
        factor = enlargement(Image.new("RGB", (64, 48)))
        assert drawn.height == 48 * factor
        assert drawn.width > 64 * factor


def test_objects_below_the_minimum_score_are_not_drawn():
    picture = Image.new("RGB", (640, 610), (128, 128, 128))
    found = {"boxes": torch.tensor([[10.0, 10, 300, 200]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.4])}
    assert np.array_equal(draw_detections(picture, found, ["a"], 0.5), picture)
    assert not np.array_equal(draw_detections(picture, found, ["a"], 0.3), picture)


def test_boxes_at_the_border_can_be_drawn():
    picture = Image.new("RGB", (640, 610))
    boxes = torch.tensor([[639.9, 609.9, 640, 610], [0, 0, 0, 0], [0, 0, 640, 610.0]])
    found = {"boxes": boxes, "labels": torch.tensor([1, 2, 1]), "scores": torch.ones(3)}
    assert draw_detections(picture, found, ["a", "b"], 0.5).size == (640, 610)


def test_a_map_of_one_class_has_its_color_everywhere():
    drawn = draw_classes(Image.new("RGB", (640, 610)), torch.ones(610, 640, dtype=torch.long), ["a", "b"])
    pixels = np.asarray(drawn)[:, :640].reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) == 1
    assert pixels[0].any()
