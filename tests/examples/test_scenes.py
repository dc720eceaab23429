"""Scenes with boxes, masks and maps of classes."""

import importlib
import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image

pytest.importorskip("skimage")
pytest.importorskip("faster_coco_eval")

from tests.support.fashion_mnist import make_files
from tests.support.paths import ROOT
from vision.config.run import load_config
from vision.data.samplers import Key
from vision.detection.coco_json import read_coco
from vision.detection.instance_masks import dense_mask
from vision.tasks.builders import create_task


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples/scenes")
        module = importlib.import_module("make_scenes")
    return module, make_files(folder), folder


@pytest.fixture(scope="module")
def root(scenes):
    module, fashion, folder = scenes
    module.make(folder / "made", train=3, val=2, seed=5, fashion=fashion)
    return folder / "made"


def test_the_same_seed_gives_the_same_files(scenes, root):
    module, fashion, folder = scenes
    module.make(folder / "again", train=3, val=2, seed=5, fashion=fashion)
    files = sorted(path.relative_to(root) for path in root.rglob("*.*"))
    assert len([file for file in files if file.parts[0] != "objects"]) == 13
    assert all((root / file).read_bytes() == (folder / "again" / file).read_bytes() for file in files)


def test_masks_boxes_and_maps_agree(root):
    for split in ("training", "validation"):
        annotations = read_coco(root / f"instances_{split}.json")
        assert annotations.remark == ""
        for image in annotations.images:
            numbers = np.asarray(Image.open(root / "annotations" / split / image.file_name))
            masks = [dense_mask(item.segmentation, image.height, image.width) for item in image.objects]
            assert np.sum(masks, axis=0).max() == 1  # none is in front of another
            for item, mask in zip(image.objects, masks, strict=True):
                assert (numbers[mask == 1] == item.label - 1).all()
                assert item.area == mask.sum()
                left, top, right, bottom = (int(side) for side in item.box)
                assert mask[top:bottom, left:right].sum() == mask.sum()


def test_every_object_has_a_crop_below_its_class(scenes, root):
    module, _, _ = scenes
    for split in ("training", "validation"):
        annotations = read_coco(root / f"instances_{split}.json")
        names = [annotations.classes[item.label - 1] for image in annotations.images for item in image.objects]
        crops = list((root / "objects" / split).rglob("*.png"))
        assert sorted(path.parent.name for path in crops) == sorted(names)
        assert {Image.open(path).size for path in crops} == {(module.CROP, module.CROP)}


def test_validation_shows_other_parts_of_textures(scenes):
    module, _, _ = scenes
    for ours, theirs in zip(module.textures("training"), module.textures("validation"), strict=True):
        assert min(ours.shape[1], theirs.shape[1]) > module.WIDTH
        assert not np.array_equal(ours[:, -1], theirs[:, 0])


@pytest.mark.parametrize(
    ("name", "extra"), [("detection", {"masks"}), ("dino", set()), ("htc", {"masks", "semantic_map"})]
)
def test_configurations_of_detection_read_the_scenes(root, name, extra):
    config = load_config(str(ROOT / f"examples/scenes/{name}.yaml"), [f"data.root={root}"])
    data = create_task(config).load_data()
    assert data.classes[-1] == "ankle boot"
    _, target = data.train[Key(0, 0)]
    assert target.keys() & {"masks", "semantic_map"} == extra


@pytest.mark.parametrize("name", ["detection", "htc"])
def test_the_small_cascade_has_fewer_boxes(root, name):
    config = load_config(str(ROOT / f"examples/scenes/{name}.yaml"), [f"data.root={root}"])
    task = create_task(config)
    detector = task.build_model(task.load_data())
    assert detector.rpn.post_nms_top_n() == 200
    images = torch.randn(1, 3, 128, 160)
    target = {"boxes": torch.tensor([[20.0, 20, 60, 60]]), "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, 128, 160, dtype=torch.uint8)
    target["semantic_map"] = torch.zeros(128, 160, dtype=torch.uint8)
    proposals = [torch.cat([target["boxes"] + shift for shift in torch.linspace(-15, 15, 100)])]
    assert len(detector.roi_heads.stages()[0].sample(proposals, [target]).boxes[0]) <= 64
    losses = detector(list(images), [target])
    assert all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("name", ["segmentation", "mask2former"])
def test_configurations_of_segmentation_read_the_scenes(root, name):
    pytest.importorskip("transformers")
    config = load_config(str(ROOT / f"examples/scenes/{name}.yaml"), [f"data.root={root}"])
    data = create_task(config).load_data()
    assert data.classes == tuple((root / "classes.txt").read_text().split("\n")[:-1])
    _, numbers = data.val[1]
    assert torch.isin(numbers, torch.arange(15)).all()


def test_a_folder_is_not_replaced(scenes, root):
    with pytest.raises(typer.BadParameter):
        scenes[0].make(root, fashion=scenes[1])
    assert json.loads((root / "instances_training.json").read_text())["images"]
