"""Segmenters as a task of the trainer."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")

from revnets import SpecError
from tests.support.errors import raises_error
from vision.cli.evaluate import evaluate_checkpoint
from vision.config.run import load_config
from vision.tasks import create_task
from vision.training.loaded_run import load_checkpoint
from vision.training.trainer import Trainer

COLORS = np.array([[200, 30, 30], [30, 200, 30]], np.uint8)
LEVEL = {"dim": 8, "depth": 1, "block": "convnext"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes that have a color each, at random places."""
    root, generator = tmp_path_factory.mktemp("maps"), np.random.default_rng(0)
    for split, count in (("training", 8), ("validation", 3)):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for number in range(count):
            blocks = generator.integers(0, 2, (5, 4), dtype=np.uint8)
            numbers = blocks.repeat(11, 0).repeat(13, 1)
            Image.fromarray(COLORS[numbers]).save(root / "images" / split / f"{number}.png")
            Image.fromarray(numbers).save(root / "annotations" / split / f"{number}.png")
    return root


def run(root, output, **options):
    values = {
        "model": {"timm": "test_revcol"},
        "task": {"type": "semantic_segmentation", "options": {"channels": 8, "auxiliary_channels": 8}},
        "output": str(output),
        "data": {"name": "semantic_maps", "root": str(root), "num_classes": 2, "img_size": 32, "short_side": 52},
        "epochs": 6,
        "batch_size": 4,
        "optimizer": {"lr": 0.01},
        **options,
    }
    values["data"].update({"long_side": 64, "window": 32, "stride": 20, "photometric": False})
    return load_config(values)


def weights(folder):
    return load_checkpoint(folder).weight_sets["raw"][0]


def test_a_segmenter_learns_and_is_evaluated(root, tmp_path):
    Trainer(run(root, tmp_path / "run", epochs=10)).fit()
    metrics = evaluate_checkpoint(tmp_path / "run", [])
    assert metrics["raw"].miou > 60


def test_exact_training_ends_with_the_weights_of_store(root, tmp_path):
    for memory in ("store", "exact"):
        Trainer(run(root, tmp_path / memory, memory=memory, epochs=1)).fit()
    expected = weights(tmp_path / "store")
    for name, tensor in weights(tmp_path / "exact").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_missing_library_is_named(root, tmp_path, monkeypatch):
    for name in [
        name for name in sys.modules if name.startswith(("vision.tasks.semantic", "vision.segm", "vision.hug"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with raises_error(code="missing-dependency", key="task", names=["transformers", "revnets[dense]"]):
        create_task(run(root, tmp_path / "run"))


def begin(values):
    """Do what a run does before its first update."""
    task = create_task(load_config(values))
    data = task.load_data()
    task.training_task(task.build_model(data), data, torch.device("cpu"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"task": {"type": "semantic_segmentation", "head": "fcn"}}, "task.head"),
        ({"task": "semantic_segmentation", "data": {"name": "digits"}}, "data"),
        ({"model": {"columns": 2, "stem": "patchify", "levels": [LEVEL, LEVEL]}}, "model"),
        ({"batch_size": 1}, "batch_size"),
        ({"task": "classification"}, "data.name"),
    ],
)
def test_invalid_runs_are_refused(root, tmp_path, changes, key):
    with pytest.raises(SpecError) as caught:
        begin({**run(root, tmp_path / "run").plain(), **changes})
    assert caught.value.key == key
