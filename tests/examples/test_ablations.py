"""`examples/experiments/ablations.py` on generated images in idx format."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.support.errors import raises_error
from tests.support.fashion_mnist import QUICK, make_files, output_of, rows, script, started
from vision.config.learning import SupervisionConfig
from vision.data.dataset import ImageData
from vision.errors import TrainingError

DATA = ImageData(None, None, tuple("0123456789"), (1, 32, 32), (0.3,), (0.3,))


@pytest.fixture
def ablations(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "ablations")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "seed_runner")


def test_tables_share_models_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    root = make_files(tmp_path)
    words = ("--root", root, "--output", tmp_path / "run", "--tables", "7,6", "--seeds", 1, "--epochs", 2, *QUICK)
    text = output_of(started("ablations", *words))
    found = [line.split("│")[2].strip() for line in text.splitlines() if "│" in line]
    assert found == ["multi-branch", "RevNet", "RevCol", "RevCol", "RevCol, supervised"]
    folders = {path.parent.name: path for path in (tmp_path / "run").glob("*/train.log")}
    assert folders.keys() == {"multi-branch-0", "revnet-0", "revcol-0", "revcol-supervised-0"}
    logs = {name: path.read_text() for name, path in folders.items()}
    picture = tmp_path / "run" / "ablations.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"

    lines = output_of(started("ablations", *words, "--markdown")).splitlines()
    assert {name: path.read_text() for name, path in folders.items()} == logs
    assert lines[0] == "| table | model | parameters | MACs | accuracy, % | CPU minutes |"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[1] for row in cells] == found
    assert [row[0] for row in cells] == ["6", "6", "6", "7", "7"]
    assert cells[2][2:] == cells[3][2:]
    error = output_of(started("ablations", "--tables", "8", "--output", tmp_path / "other"), 1)
    assert error == "error: --tables '8': choose from 5, 6, 7, as in --tables 5,7\n"
    assert not (tmp_path / "other").exists()
    for row in cells:
        assert float(row[4]) > 30  # chance level is 10 %
    assert rows(text)["7"][3] == cells[3][4]


def test_models_of_each_table_have_equal_size(ablations: ModuleType, runner: ModuleType, tmp_path: Path) -> None:
    runs = {name: runner.planned(ablations.MODELS, name, 0, ablations.BUDGET, tmp_path) for name in ablations.MODELS}
    sizes = {name: runner.size_of(run.config, DATA) for name, run in runs.items()}
    for ablation in ablations.TABLES.values():
        of_table = {name: sizes[name] for name in ablation.models}
        runner.require_equal(of_table, **ablations.EQUAL)
        macs = [size.macs for size in of_table.values()]
        assert max(macs) <= 1.02 * min(macs)
        unequal = {**of_table, "RevCol": sizes["RevCol"]._replace(macs=2 * sizes["RevCol"].macs)}
        with raises_error(TrainingError, code="conflicting-values", names=["macs", "2%"]):
            runner.require_equal(unequal, **ablations.EQUAL)
    assert {name for ablation in ablations.TABLES.values() for name in ablation.models} == set(ablations.MODELS)
    supervised = {name for name, run in runs.items() if run.config.supervision == SupervisionConfig()}
    assert supervised == {"RevCol, supervised"}
    for name in ("fashion_multi_branch", "fashion_revnet"):
        text = (ablations.CONFIGS / "ablations" / f"{name}.yaml").read_text()
        size = sizes["RevNet" if "revnet" in name else "multi-branch"]
        assert f"{size.parameters:,}" in text
        assert f"{size.macs:,}" in text


@pytest.mark.parametrize("tables", ["4", "5,8", "", "five"])
def test_unknown_tables_are_rejected(ablations: ModuleType, tables: str) -> None:
    with raises_error(TrainingError, code="unknown-choice", names=[f"--tables '{tables}'", "5, 6, 7"]):
        ablations.choose(tables)
    assert list(ablations.choose("7, 5")) == ["5", "7"]
