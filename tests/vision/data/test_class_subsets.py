"""A model of ImageNet-22K on ImageNet-1K: classes are matched by WordNet id in any order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
import yaml
from timm.data import ImageNetInfo
from typer.testing import CliRunner

from revnets import SpecError
from tests.support import official_reference as official
from tests.support.errors import raises_error
from tests.support.image_folders import folder
from tests.support.official_reference import TEST
from vision.cli import main
from vision.cli.evaluate import evaluate_checkpoint
from vision.config.run import load_config
from vision.data.class_subsets import imagenet_classes, subset
from vision.data.dataset import load_data
from vision.errors import CheckpointError
from vision.training.trainer import Trainer
from vision.weights.convert import convert_file

TENCH, CHIHUAHUA, TEDDY = "n01440764", "n02085620", "n04399382"  # the last is missing in ImageNet-22K


def images(root: Path, *names: str) -> Path:
    """A folder of images of these three classes, in both splits."""
    folder(root, train=4, val=3)
    for split in ("train", "val"):
        for index, old in enumerate(("ant", "bee", "cat")):
            (root / split / old).rename(root / split / str(index))
        for index, new in enumerate(names):
            (root / split / str(index)).rename(root / split / new)
    return root


@pytest.mark.parametrize(
    ("count", "missing"), [(21841, {TEDDY}), (21842, set()), (21843, {TEDDY}), (11821, 7), (11221, 9), (1000, set())]
)
def test_imagenet_1k_in_the_others(count, missing):
    """The right column of scores by name; only Microsoft's order has those of ImageNet-1K in front."""
    names, thousand = imagenet_classes(count), ImageNetInfo("imagenet-1k").label_names()
    found = subset(names, thousand)
    scores = torch.arange(count, dtype=torch.float)[None] + 1
    chosen = found(scores)[0]
    for name, score in zip(thousand, chosen.tolist(), strict=True):
        assert score == (1 if name in found.unknown else names.index(name) + 1)
    assert len(found.unknown) == missing if isinstance(missing, int) else set(found.unknown) == missing
    assert (found.index.tolist() == list(range(1000))) == (count in (1000, 21842))
    if not missing:
        assert found.unknown == ()


def test_classes_without_names_are_those_of_imagenet_1k():
    names = imagenet_classes(21841)
    numbered, named = (subset(names, classes) for classes in (list(map(str, range(1000))), imagenet_classes(1000)))
    assert torch.equal(numbered.index, named.index)
    assert numbered.unknown == (TEDDY,)


def test_no_class_in_common_and_no_such_imagenet():
    with raises_error(code="class-mismatch", key="--subset", names="such as ant"):
        subset(("bee", "cat"), ("ant", "dog"))
    with raises_error(code="class-mismatch", key="--subset", names=["77 classes", "ImageNet"]):
        imagenet_classes(77)


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """An official file of ImageNet-22K, a recipe for it, and images of three classes of ImageNet-1K."""
    root = tmp_path_factory.mktemp("in22k")
    net = replace(TEST, classes=21841, supervised=True)
    states = [official.random_state(net, seed) for seed in (1, 2)]
    official.save_classification(root / "22k.pth", *states)
    data = images(root / "in1k", TENCH, CHIHUAHUA, TEDDY)
    recipe = {
        "output": "unused", "model": {"timm": "test_revcol"}, "batch_size": 4, "supervision": {"heads": 4},
        "data": {"name": "folder", "root": str(data), "num_classes": 21841, "img_size": 64},
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root, net, states


@torch.no_grad()
@pytest.mark.parametrize("ours", [False, True])
def test_official_weights_of_22k_on_images_of_1k(released, ours, tmp_path):
    """Both sets of weights, against the official forward and scores looked up name by name."""
    root, net, states = released
    source = root / "22k.pth"
    if ours:
        source = tmp_path / "ours.safetensors"
        convert_file(root / "22k.pth", source)
    found = evaluate_checkpoint(source, ["data.num_classes=null"], recipe=str(root / "recipe.yaml"), by_name=True)
    assert list(found) == (["raw"] if ours else ["raw", "ema"])
    names = ImageNetInfo("imagenet-22k").label_names()
    data = load_data(load_config(root / "recipe.yaml", ["data.num_classes=null"]).data, 0)
    batch, labels = zip(*(data.val[index] for index in range(len(data.val))), strict=True)
    labels = torch.tensor(labels)
    for state, metrics in zip(states, found.values(), strict=False):
        scores = official.forward(state, net, torch.stack(batch))[0][-1]
        lowest = scores.min(1).values
        three = torch.stack([scores[:, names.index(TENCH)], scores[:, names.index(CHIHUAHUA)], lowest], 1)
        assert metrics.images == 9
        assert metrics.loss == pytest.approx(F.cross_entropy(three, labels).item(), rel=1e-4)
        assert metrics.top1 == pytest.approx(100 * (three.argmax(1) == labels).float().mean().item())
        assert metrics.confusion[:, 2].sum() == 0  # no image is predicted as a class that the model does not have


app = typer.Typer()
app.command("train")(main.train)
app.command("eval")(main.evaluate)


def call(*words) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})
    if isinstance(result.exception, SpecError):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_command(released):
    """The command of the help, with the number of classes of the model in the recipe."""
    root, *_ = released
    code, out, _ = call("eval", root / "22k.pth", "--config", root / "recipe.yaml", "--subset")
    assert code == 0
    assert f"2 of 21841 classes; the model does not have 1 of the data ({TEDDY}), whose images count as wrong" in out
    assert "9 images" in out
    assert "ema" in out


def test_a_missing_subset_option_is_reported(released):
    root, *_ = released
    recipe = root / "recipe.yaml"
    with raises_error(
        CheckpointError, code="missing-config", source=root / "22k.pth", names="--config revcol_tiny_in1k"
    ):
        evaluate_checkpoint(root / "22k.pth")
    with raises_error(code="class-mismatch", key="--subset", names=["21841 classes", "has 3", "add --subset"]):
        evaluate_checkpoint(root / "22k.pth", ["data.num_classes=null"], recipe=str(recipe))
    with raises_error(CheckpointError, code="missing-file", source=root / "no.pth"):
        evaluate_checkpoint(root / "no.pth", recipe=str(recipe))
    with raises_error(CheckpointError, code="weights-mismatch", names="test_revcol_huge"):
        evaluate_checkpoint(root / "22k.pth", ["model={timm: test_revcol_huge}"], recipe=str(recipe), by_name=True)
    code, out, _ = call("eval", root / "22k.pth", "--config", recipe)
    assert code == 0
    assert "data.num_classes is 21841, but the data names 3 classes" in out  # their numbers are not the model's


def test_a_run_is_evaluated_on_some_of_its_classes(tmp_path):
    """The checkpoint has class names. A class that the model lacks is always wrong."""
    data = {"name": "folder", "root": str(images(tmp_path / "all", "ant", "bee", "cat")), "img_size": 32}
    model = {"timm": "test_revcol", "columns": 2}
    run = {"output": str(tmp_path / "run"), "model": model, "data": data, "epochs": 1, "batch_size": 6}
    Trainer(load_config(run)).fit()
    whole = evaluate_checkpoint(tmp_path / "run")["raw"]
    other = images(tmp_path / "other", "zebra", "cat", "bee")  # images of bees are under `cat` and vice versa
    with raises_error(CheckpointError, code="weights-mismatch"):
        evaluate_checkpoint(tmp_path / "run", ["model.columns=3"])
    found = evaluate_checkpoint(tmp_path / "run", [f"data.root={other}"], by_name=True)["raw"]
    assert found.confusion.shape == (3, 3)
    assert found.confusion[:, 2].sum() == 0
    bee, cat = 0, 1  # here; what was taken for one of them among three is taken for it among two
    assert found.confusion[bee, cat] >= whole.confusion[2, 2]
    assert found.confusion[cat, bee] >= whole.confusion[1, 1]
    assert whole.confusion[2, 2] + whole.confusion[1, 1] > 0
