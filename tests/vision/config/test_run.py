"""The YAML of a run, and the errors for wrong ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from revnets import load_spec
from tests.support.errors import raises_error
from vision.config.run import load_config
from vision.paths import CONFIGS

NET = {
    "columns": 2,
    "stem": {"type": "patchify", "in_chans": 1, "patch": 2},
    "levels": [{"dim": 3, "depth": 1, "block": "convnext"}, {"dim": 5, "depth": 1, "block": "mlp"}],
    "head": {"type": "classifier", "num_classes": 10},
}
RUN = {"model": NET, "output": "runs/x"}


@pytest.mark.parametrize("recipe", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_recipes_are_found_by_name_and_come_back_from_plain_data(recipe):
    config = load_config(recipe)
    assert load_config(config.plain()) == config
    assert load_config(yaml.safe_load(yaml.safe_dump(config.plain()))) == config


def test_a_memory_budget_comes_back_from_plain_data():
    config = load_config({**RUN, "memory": {"budget": "1GiB"}})
    assert load_config(config.plain()) == config


def test_model_from_a_file_is_read_relative_to_it_and_can_be_overridden(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "net.yaml").write_text(yaml.safe_dump(NET))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "model": "nets/net.yaml", "memory": "store"}))
    monkeypatch.chdir("/")
    overrides = ["model.columns=3", "model.levels.1.dim=7", "memory=[store, exact, invert]", "epochs=2"]
    config = load_config(tmp_path / "run.yaml", overrides)
    inline = load_config({**RUN, "model": NET}, overrides)
    assert config == inline
    assert config.net == load_spec({**NET, "memory": ["store", "exact", "invert"]}, ["columns=3", "levels.1.dim=7"])


def test_a_model_path_from_the_command_line_is_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets" / "net.yaml").write_text(yaml.safe_dump(RUN["model"]))
    monkeypatch.chdir(tmp_path)
    config = load_config("digits", ["model=nets/net.yaml", "model.columns=7"])
    assert config.net == load_spec(RUN["model"], ["columns=7"])


def test_memory_of_the_run_wins_over_that_of_the_net():
    assert load_config({**RUN, "model": {**NET, "memory": "invert"}}).net.memory == "invert"
    assert load_config({**RUN, "model": {**NET, "memory": "invert"}, "memory": "store"}).net.memory == "store"


def test_amp_accepts_off():
    assert load_config(RUN, ["amp=off"]).amp == "off"
    assert load_config(RUN, ["amp=bfloat16"]).amp == "bfloat16"


@pytest.mark.parametrize(
    ("override", "code", "key", "names"),
    [
        ("epoch=3", "unknown-key", "epoch", ["3", "epochs"]),
        ("optimizer.learning_rate=3", "unknown-key", "optimizer.learning_rate", "3"),
        ("optimizer.name=adamww", "unknown-choice", "optimizer.name", ["adamww", "mean adamw?"]),
        ("optimizer.lr=0", "out-of-range", "optimizer.lr", "more than 0"),
        ("optimizer.lr=fast", "wrong-type", "optimizer.lr", ["fast", "number"]),
        ("schedule.name=cosin", "unknown-choice", "schedule.name", ["cosin", "'cosine'"]),
        ("schedule.warmup_epochs=30", "conflicting-values", "schedule.warmup_epochs", "30"),
        ("amp=fp16", "unknown-choice", "amp", ["fp16", "float16"]),
        ("mixup={prob: 0.5}", "missing-key", "mixup", "mixup_alpha"),
        ("batch_size=0", "out-of-range", "batch_size", "at least 1"),
        ("data.name=mnist", "unknown-choice", "data.name", ["mnist", "digits"]),
        ("data.rotate=-1", "out-of-range", "data.rotate", "-1"),
        ("memory=exakt", "unknown-choice", "memory", ["exakt", "exact"]),
        ("memory=[exact]", "conflicting-values", "memory", "2 columns"),
        ("device=gpu", "unknown-choice", "device", ["gpu", "cuda"]),
        ("model.colums=3", "unknown-key", "model.colums", "columns"),
        ("model.levels.0.block=convnex", "unknown-component", "model.levels.0.block", ["convnex", "convnext"]),
        ("model=3", "wrong-type", "model", "3"),
        ("output=", "wrong-type", "output", "null"),
        ("keep=0", "out-of-range", "keep", "at least 1"),
    ],
)
def test_a_wrong_value_is_reported_on_one_line(override, code, key, names):
    with raises_error(code=code, key=key, source="command line", names=names):
        load_config(RUN, [override])


def test_mixup_refuses_an_odd_batch():
    with raises_error(code="conflicting-values", key="batch_size", names=["7", "even"]):
        load_config(RUN, ["batch_size=7", "mixup.mixup_alpha=0.8"])
    load_config(RUN, ["batch_size=7"])


def test_missing_keys_and_files_are_named(tmp_path):
    with raises_error(code="missing-key", key="output"):
        load_config({"model": NET})
    with raises_error(code="missing-file", source="digit", names="Did you mean digits?"):
        load_config("digit")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, "model": "nett.yaml"}))
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(NET))
    with raises_error(code="missing-file", names=["nett.yaml", f"{tmp_path / 'net.yaml'}?"]):
        load_config(tmp_path / "run.yaml")


def test_every_file_is_read_once(tmp_path, monkeypatch):
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(NET))
    (tmp_path / "run.yaml").write_text("model: net.yaml\noutput: runs/mine\n")
    read = []
    original = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, **how: read.append(path.name) or original(path, **how))
    assert load_config(tmp_path / "run.yaml", ["model.columns=3", "epochs=7"]).net.columns == 3
    assert sorted(read) == ["net.yaml", "run.yaml"]


@pytest.mark.parametrize("key", ["ema", "mixup", "compile", "supervision", "pretrained", "clip_grad", "save_every"])
@pytest.mark.parametrize("word", ["off", "no", "false", "null"])
def test_keys_that_are_off_by_default_accept_off(key, word):
    assert getattr(load_config("digits", ["output=x", f"{key}={word}"]), key) is None


def test_resume_accepts_no():
    assert load_config("digits", ["output=x", "resume=no"]).resume == "none"


def test_every_path_expands_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "net.yaml").write_text(
        "columns: 2\nstem: {type: patchify, patch: 4}\nlevels: [&level {dim: 8, depth: 1, block: convnext}, *level]"
    )
    (tmp_path / "run.yaml").write_text(
        "model: ~/net.yaml\noutput: ~/runs/mine\nresume: ~/runs/old.pt\npretrained: {source: ~/weights.pt}\n"
        "data: {name: folder, root: ~/data, class_map: ~/classes.txt}"
    )
    config = load_config("~/run.yaml")
    assert config.net.columns == 2
    paths = (config.output, config.resume, config.pretrained.source, config.data.root, config.data.class_map)
    names = ("runs/mine", "runs/old.pt", "weights.pt", "data", "classes.txt")
    assert paths == tuple(str(tmp_path / name) for name in names)
    assert load_config("digits", ["model=~/net.yaml", "output=~/x"]).output == str(tmp_path / "x")
    assert load_config("digits", ["data={name: idx, root: ~/idx}", "output=x"]).data.root == str(tmp_path / "idx")


@pytest.mark.parametrize(
    "override", ["epochs=0x" + "f" * 20, "seed=0x" + "f" * 17, "workers=2000", "batch_size=10000000000"]
)
def test_too_large_numbers_are_refused(override):
    with raises_error(code="out-of-range", key=override.partition("=")[0]):
        load_config("digits", ["output=x", override])


def test_too_many_classes_are_refused():
    data = {"name": "folder", "root": "data", "num_classes": 10**15}
    with raises_error(code="out-of-range", key="data.num_classes"):
        load_config({"model": {"timm": "revcol_tiny"}, "output": "run", "data": data})


def test_a_directory_does_not_hide_a_recipe_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert load_config("digits", ["output=x"]).epochs > 0
    os.mkfifo("fashion")
    with raises_error(code="not-a-file", source="fashion"):
        load_config("fashion", ["output=x"])
