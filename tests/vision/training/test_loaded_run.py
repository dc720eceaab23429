"""`vision.load_run`: the model of a run, its classes, its transform and its images."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import revnets
import vision
from tests.support.errors import raises_error
from tests.support.timeouts import HANG
from vision.config.run import load_config
from vision.errors import CheckpointError
from vision.training.loaded_run import load_checkpoint
from vision.training.trainer import Trainer

PAGE = Path(__file__).parents[3] / "docs/guides/training.md"
TINY = ["model.columns=2", "epochs=1", "device=cpu", "ema.decay=0.5"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loaded") / "run"
    Trainer(load_config("digits", [*TINY, f"output={folder}"])).fit()
    return folder


@pytest.fixture(scope="module")
def folder_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on images in directories, and the directory of the images."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number in range(4):
                pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{number}.png")
    given = {
        "output": str(root / "run"),
        "model": {"timm": "test_revcol"},
        "data": {"name": "folder", "root": str(root), "img_size": 32},
        "epochs": 1,
        "batch_size": 4,
        "device": "cpu",
    }
    Trainer(load_config(given)).fit()
    return root / "run", root


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"batch_size": 2**22}, "batch_size"),
        ({"data": {"name": "folder", "root": "x", "img_size": 16_000}}, "data.img_size"),
        ({"data": {"name": "folder", "root": "x", "img_size": 10**9}}, "data.img_size"),
        ({"workers": 10**9}, "workers"),
    ],
)
def test_a_checkpoint_with_too_large_sizes_is_refused(run, tmp_path, changes, key):
    state = torch.load(run / "checkpoints/best.pt", weights_only=True)
    path = tmp_path / "a.pt"
    torch.save({**state, "config": {**state["config"], "mixup": None, **changes}}, path)
    with raises_error(code="out-of-range", source=str(path), key=key):
        load_checkpoint(path)


def test_an_override_reduces_the_batch_of_a_checkpoint(run, tmp_path):
    state = torch.load(run / "checkpoints/best.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "batch_size": 2**30}}, tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", ["batch_size=14"]).config.batch_size == 14


def test_workers_of_a_checkpoint_are_limited_to_the_processors(run, tmp_path):
    state = torch.load(run / "checkpoints/best.pt", weights_only=True)
    torch.save({**state, "config": {**state["config"], "workers": 1024}}, tmp_path / "a.pt")
    assert 1 <= load_checkpoint(tmp_path / "a.pt").config.workers <= os.cpu_count()
    assert load_checkpoint(run).config.workers == 0


def rebuilt(run: Path, key: str) -> dict[str, Tensor]:
    """The weights that a plain reader of the file finds."""
    return torch.load(run / "checkpoints/best.pt", weights_only=True)[key]


@pytest.mark.parametrize(("weights", "key"), [("auto", "ema"), ("ema", "ema"), ("raw", "model")])
def test_weights_are_those_of_the_file(run: Path, weights: str, key: str) -> None:
    loaded = vision.load_run(run, weights)
    own, given = loaded.model.state_dict(), rebuilt(run, key)
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)
    assert not loaded.model.training


def test_scores_are_those_of_a_model_built_by_hand(run: Path) -> None:
    state = torch.load(run / "checkpoints/best.pt", weights_only=True)
    net = revnets.build(state["config"]["model"]).eval()
    net.load_state_dict(state["ema"])
    loaded = vision.load_run(run / "checkpoints/best.pt")
    image, label = loaded.val_image(3)
    with torch.no_grad():
        assert torch.equal(loaded.model(image), net(image))
    assert label == int(loaded.data.val[3][1])


def test_classes_and_configuration(run: Path) -> None:
    loaded = vision.load_run(run, overrides=["memory=store", "batch_size=7"])
    assert loaded.classes == tuple("0123456789")
    assert loaded.config.batch_size == 7
    assert loaded.model.columns.memory == ("store", "store")


def test_the_transform_is_that_of_the_validation_set(folder_run: tuple[Path, Path]) -> None:
    run, root = folder_run
    loaded = vision.load_run(run)
    picture = Image.open(root / "validation/cat/0.png").convert("RGBA")
    assert torch.equal(loaded.transform(picture), loaded.data.val[0][0])


def test_a_model_is_loaded_and_used_without_its_data(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, root = folder_run
    absent = [f"data.root={tmp_path / 'absent'}"]
    loaded = vision.load_run(run, overrides=absent)
    picture = Image.open(root / "validation/dog/1.png")
    with torch.no_grad():
        found = loaded.model(loaded.transform(picture)[None])
        wanted = vision.load_run(run).model(vision.load_run(run).data.val[5][0][None])
    assert loaded.classes == ("cat", "dog")
    assert torch.equal(found, wanted)
    with raises_error(code="missing-file", key="data.root", names="absent"):
        _ = loaded.data


def test_data_of_other_classes_are_refused(folder_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, root = folder_run
    for split in ("train", "validation"):
        for name in ("cat", "dog", "owl"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes((root / "train/cat/0.png").read_bytes())
    loaded = vision.load_run(run, overrides=[f"data.root={tmp_path}"])
    with raises_error(code="class-mismatch", names=["3", "2"]):
        _ = loaded.data


def test_wrong_arguments_are_refused(run: Path, tmp_path: Path) -> None:
    with raises_error(ValueError, code="unknown-choice", names=["auto", "raw", "ema"]):
        vision.load_run(run, "averaged")
    with raises_error(CheckpointError, code="missing-file", source=tmp_path):
        vision.load_run(tmp_path)
    with raises_error(CheckpointError, code="weights-mismatch"):
        vision.load_run(run, overrides=["model.columns=3"])
    with pytest.raises(IndexError, match="no image 360; its length is 360"):
        vision.load_run(run).val_image(360)


def test_a_file_of_weights_is_not_a_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    with raises_error(CheckpointError, code="missing-config", source=path):
        load_checkpoint(path)


def test_missing_averages_are_reported(folder_run: tuple[Path, Path]) -> None:
    with raises_error(CheckpointError, code="missing-weights"):
        vision.load_run(folder_run[0], "ema")
    loaded = vision.load_run(folder_run[0])
    assert torch.equal(
        loaded.model.state_dict()["stem.conv.weight"], rebuilt(folder_run[0], "model")["stem.conv.weight"]
    )


def test_example_of_the_guide_runs(
    folder_run: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, root = folder_run
    section = PAGE.read_text(encoding="utf-8").split("## The trained model in Python")[1].split("\n## ")[0]
    (text,) = re.findall(r"```py\n(.*?)```", section, flags=re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mine").symlink_to(run)
    (tmp_path / "picture.png").write_bytes((root / "validation/dog/1.png").read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(text, {})
    assert capsys.readouterr().out.strip() in ("cat", "dog")


def test_the_package_is_imported_without_checkpoints_and_data() -> None:
    code = "import sys, vision; print([name for name in sys.modules if name.startswith('vision.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=HANG)
    loaded = yaml.safe_load(done.stdout)
    assert "vision.revcol" in loaded
    packages = {name.split(".")[1] for name in loaded}
    assert not packages & {"checkpoints", "data", "training", "weights", "analysis", "supervision"}
