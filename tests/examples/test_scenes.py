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
from vision.detection.coco_data import load_coco
from vision.detection.coco_json import read_coco
from vision.detection.instance_masks import dense_mask


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
    assert len(files) == 13
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


def test_validation_shows_other_parts_of_textures(scenes):
    module, _, _ = scenes
    for ours, theirs in zip(module.textures("training"), module.textures("validation"), strict=True):
        assert min(ours.shape[1], theirs.shape[1]) > module.WIDTH
        assert not np.array_equal(ours[:, -1], theirs[:, 0])


@pytest.mark.parametrize("name", ["detection", "dino"])
def test_configurations_of_detection_read_the_scenes(root, name):
    config = load_config(str(ROOT / f"examples/scenes/{name}.yaml"), [f"data.root={root}"])
    data = load_coco(config.data, 0)
    assert data.classes[-1] == "ankle boot"
    _, target = data.train[Key(0, 0)]
    assert ("masks" in target) == (name == "detection")


def test_the_configuration_of_segmentation_reads_the_scenes(root):
    pytest.importorskip("transformers")
    from vision.segmentation.semantic_maps import load_semantic_maps

    config = load_config(str(ROOT / "examples/scenes/segmentation.yaml"), [f"data.root={root}"])
    data = load_semantic_maps(config.data, 0)
    assert data.classes == tuple((root / "classes.txt").read_text().split("\n")[:-1])
    _, numbers = data.val[1]
    assert torch.isin(numbers, torch.arange(15)).all()


def test_a_folder_is_not_replaced(scenes, root):
    with pytest.raises(typer.BadParameter):
        scenes[0].make(root, fashion=scenes[1])
    assert json.loads((root / "instances_training.json").read_text())["images"]
