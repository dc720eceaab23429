"""A run with moved data is resumed and evaluated if classes and numbers of images are the same."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.support import image_folders as images
from tests.support.errors import raises_error
from tests.support.training_runs import assert_same
from vision.checkpoints import reader, resume
from vision.cli.evaluate import evaluate_checkpoint
from vision.config.run import load_config
from vision.data.class_subsets import class_difference
from vision.data.dataset import ImageData, load_data
from vision.distributed.context import World
from vision.training.loaded_run import Checkpoint, load_run
from vision.training.trainer import Trainer
from vision.weights.finetune import class_names_in


def settings(output: Path, root: Path | str, **changes):
    return {
        "model": {"timm": "test_revcol", "dims": [4, 4, 4, 4], "depths": [1, 1, 1, 1], "columns": 2},
        "output": str(output),
        "data": {"name": "folder", "root": str(root), "img_size": 32, **changes.pop("data", {})},
        "batch_size": 8,
        "epochs": 1,
        "device": "cpu",
        **changes,
    }


def fit(*given, **changes):
    return Trainer(load_config(settings(*given, **changes)), Console(quiet=True)).fit()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one epoch on `data`, both in this folder."""
    place = tmp_path_factory.mktemp("finished")
    fit(place / "run", images.folder(place / "data"))
    return place


@pytest.fixture
def copied(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "job")
    return tmp_path / "job"


def test_a_run_resumes_with_moved_data(copied, tmp_path, monkeypatch):
    """As a relative path, through a link and moved: with the bits of the run that stays where it was."""
    states = []
    (tmp_path / "link").symlink_to(copied / "data")
    shutil.copytree(copied / "data", tmp_path / "moved")
    monkeypatch.chdir(copied)
    for number, root in enumerate((copied / "data", "data", f"{tmp_path / 'link'}/", tmp_path / "moved")):
        output = shutil.copytree(copied / "run", tmp_path / f"run{number}")
        states.append(reader.read(fit(output, root, epochs=2).last))
    for state in states[1:]:
        assert_same(state["model"], states[0]["model"], "model")
    assert states[0]["samples"] == {"train": 24, "val": 9}


def test_other_classes_are_refused(copied):
    for split in ("train", "val"):
        (copied / "data" / split / "ant").rename(copied / "data" / split / "zebra")
    with raises_error(code="settings-differ", key="data", names=["the class bee", "has ant"]):
        fit(copied / "run", copied / "data", epochs=2)
    with raises_error(code="class-mismatch", key="--subset", names=["class 0 is bee", "ant in the model"]):
        evaluate_checkpoint(copied / "run", [f"data.root={copied / 'data'}"])
    with raises_error(code="class-mismatch", key="data", names=["class 0 is bee", "ant in the model"]):
        _ = load_run(copied / "run", overrides=[f"data.root={copied / 'data'}"]).data


@pytest.mark.parametrize("part", ["train", "val"])
def test_another_number_of_images_is_refused(copied, part):
    (copied / "data" / part / "bee" / "1.jpg").unlink()
    with raises_error(code="settings-differ", key="data", names=[f"in {part}", str({"train": 23, "val": 8}[part])]):
        fit(copied / "run", copied / "data", epochs=2)


def test_a_checkpoint_of_an_earlier_version_resumes(copied):
    """As earlier versions wrote it."""
    for path in (copied / "run" / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        del state["samples"], state["config"]["data"]["exif"]
        path.unlink()
        torch.save(state, path)
    assert fit(copied / "run", copied / "data", epochs=2).last.name == "step-0000006.pt"


def test_other_settings_of_the_data_are_refused(copied):
    for change, key in (({"exif": "apply"}, "data.exif"), ({"img_size": 64}, "data.img_size")):
        with raises_error(code="settings-differ", key=key):
            fit(copied / "run", copied / "data", epochs=2, data=change)


def test_data_sets_of_hugging_face_are_compared_by_their_last_name():
    config, path = load_config(settings(Path("x"), "cache", data={"name": "hfds//old/photos"})), Path("x.pt")
    state = {"config": config.plain(), "world": 1, "classes": ["a", "b"]}
    data = ImageData([], [], ("a", "b"), (3, 32, 32), (0.0,), (1.0,))
    moved = load_config(settings(Path("x"), "elsewhere", data={"name": "hfds//new/photos"}))
    resume.require_same_course(moved, 1, state, path, data)
    other = load_config(settings(Path("x"), "cache", data={"name": "hfds//old/paintings"}))
    with raises_error(code="settings-differ", key="data.name"):
        resume.require_same_course(other, 1, state, path, data)


@pytest.mark.parametrize("kind", [list, tuple])
def test_lists_and_tuples_of_classes_are_compared(kind):
    """A checkpoint may hold them as a list or as a tuple."""
    config, path = load_config(settings(Path("x"), "cache")), Path("x.pt")
    state = {"config": config.plain(), "world": 1, "classes": kind(["a", "c"])}
    data = ImageData([], [], ("a", "b"), (3, 32, 32), (0.0,), (1.0,))
    with raises_error(code="settings-differ", key="data", names=["class b", "c at this position"]):
        resume.require_same_course(config, 1, state, path, data)
    assert Checkpoint(path, config, state).classes == ("a", "c")
    assert class_names_in(state) == ("a", "c")


def test_other_excluded_images_are_refused(finished, tmp_path):
    """Their numbers are equal."""
    found = []
    for name in ("ant/1.jpg", "ant/2.jpg"):
        (tmp_path / "list.txt").write_text(name)
        config = load_config(settings(tmp_path, finished / "data", data={"exclude": str(tmp_path / "list.txt")}))
        found.append(load_data(config.data, config.seed))
    state = {"config": config.plain(), "world": 1, "provenance": found[0].provenance}
    resume.require_same_course(config, 1, state, tmp_path, found[0])
    for data in (found[1], replace(found[0], provenance={})):
        with raises_error(code="settings-differ", key="data.exclude"):
            resume.require_same_course(config, 1, state, tmp_path, data)
    del state["provenance"]  # as earlier versions wrote it
    resume.require_same_course(config, 1, state, tmp_path, found[1])


def test_classes_in_another_order_are_matched_by_name(finished, tmp_path):
    """A class map reverses the numbers of the data; the metrics do not change."""
    (tmp_path / "map.txt").write_text("cat\nbee\nant\n")
    root = f"data.root={finished / 'data'}"
    whole = evaluate_checkpoint(finished / "run", [root])["raw"]
    turned = evaluate_checkpoint(finished / "run", [root, f"data.class_map={tmp_path / 'map.txt'}"])["raw"]
    assert (turned.top1, turned.images) == (whole.top1, whole.images)
    assert turned.loss == pytest.approx(whole.loss)
    assert torch.equal(turned.confusion, whole.confusion.flip(0, 1))


def test_class_names_are_compared_if_present():
    assert class_difference(("ant", "bee"), ("ant", "bee")) == ""
    assert class_difference(("ant", "bee"), ("0", "1")) == ""  # of a stream
    assert class_difference(("0", "1"), ("ant", "bee")) == ""
    assert "class 1 is cat" in class_difference(("ant", "bee"), ("ant", "cat"))
    assert "class 0 is 1" in class_difference(("0", "1"), ("1", "2"))


def test_a_new_head_for_other_classes_of_equal_number(finished, tmp_path):
    root = images.folder(tmp_path / "data")
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / "zebra")
    for classes, kept in ((root, False), (finished / "data", True)):
        given = settings(tmp_path / "run", classes, pretrained={"source": str(finished / "run")})
        found = Trainer(load_config(given), Console(quiet=True), World()).state.beginning
        assert ("its classifier" in found) == kept


def test_training_and_evaluation_print_warnings_about_data(tmp_path, capsys):
    root = images.folder(tmp_path / "data")
    shutil.rmtree(root / "val" / "cat")
    console = Console(file=io.StringIO(), width=200)
    Trainer(load_config(settings(tmp_path / "run", root)), console).fit()
    evaluate_checkpoint(tmp_path / "run")
    for text in (console.file.getvalue(), capsys.readouterr().out):
        assert text.count("validation has no images of cat") == 1
