"""The custom task of docs/guides/training.md trains and evaluates as described."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.support.paths import ROOT
from tests.vision.cli.test_train_and_eval import app
from vision.checkpoints import reader
from vision.distributed.context import World
from vision.tasks import Task
from vision.training.run_log import LOG, read_log

TEXT = (ROOT / "docs" / "guides" / "training.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Working directory with the files of the page."""
    for name, text in re.findall(r"```\w+\n# ([\w.]+)\n(.*?)```", TEXT, flags=re.DOTALL):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_tasks", None)


def test_custom_task_trains_and_evaluates(folder):
    settings = yaml.safe_load((folder / "brightness.yaml").read_text())
    for command in (["train", "brightness.yaml"], ["eval", settings["output"], "--trust"]):
        assert f"    revnets {' '.join(command)}\n" in TEXT
        result = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
    errors = {
        line["step"]: line["raw_mae"] for line in read_log(folder / settings["output"] / LOG) if "raw_mae" in line
    }
    best = min(errors, key=errors.__getitem__)
    assert len(errors) == settings["epochs"]
    assert reader.read(folder / settings["output"] / "checkpoints" / "best.pt")["progress"]["step"] == best
    assert f"{errors[best]:.4f}" in result.stdout

    from my_tasks import MeanError  # pyright: ignore[reportMissingImports]

    evaluator = MeanError()
    evaluator.update(torch.tensor([[1.0], [4.0]]), (None, torch.tensor([0.0, 2.0])))
    assert evaluator.compute(World()) == {"mae": 1.5}


def test_table_names_every_attribute_of_a_task():
    rows = re.findall(r"^\| (`.*?) \| ", TEXT.split("## Your own task")[1].split("\n## ")[0], flags=re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == {name for name in vars(Task) if not name.startswith("_")}
