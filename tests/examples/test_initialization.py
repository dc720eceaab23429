"""`examples/experiments/initialization.py` on generated idx files: recording, resuming and comparison."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import typer
from rich.console import Console

from tests.support.errors import raises_error
from tests.support.fashion_mnist import make_files, script
from vision.data.dataset import ImageData
from vision.errors import TrainingError
from vision.training.trainer import Trainer

UPDATES = 5
"""Updates of 64 images, which use all generated images."""


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "initialization")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("fashion-mnist"))


def settings(study: ModuleType, **changes: Any) -> Any:
    given = {"model": "revcol", "columns": 4, "init": "paper", "updates": 500, "supervision": False}
    return study.Trial(**given | {"drop_path": 0.0, "seed": 0} | changes)


def result(study: ModuleType, accuracy: float, **changes: Any) -> Any:
    return study.TrialResult(trial=settings(study, **changes), parameters=7, accuracy=(1.0, accuracy))


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


class StopsAfterSaving(Trainer):
    """Receives SIGTERM with its first checkpoint."""

    stopped = False

    def _save(self, best: bool = False) -> Path:
        path = super()._save(best)
        if not StopsAfterSaving.stopped:
            StopsAfterSaving.stopped = True
            os.kill(os.getpid(), signal.SIGTERM)
        return path


def test_stopped_study_resumes_and_repeats_nothing(
    study: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"models": "revcol", "updates": UPDATES, "seeds": 1, "root": files, "supervision": True, "drop_path": 0.2}
    monkeypatch.setattr(study, "load_config", saving_every_update(study.load_config))
    output, other = tmp_path / "results.jsonl", tmp_path / "other.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(study, "Trainer", StopsAfterSaving)
        with pytest.raises(typer.Exit) as ended:
            study.main(output=output, **call)
    assert ended.value.exit_code == 128 + signal.SIGTERM
    assert not output.exists()

    study.main(output=output, **call)
    study.main(output=other, **call)
    assert "Resumed" in capsys.readouterr().out
    assert output.read_text() == other.read_text()
    assert list((tmp_path / "results.runs").iterdir()) == []
    assert output.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr(study, "finished", None)  # training would fail
    study.main(output=output, **call)
    study.main(output=output, report=True)
    found = study.read_results(output, quiet())
    assert [trial.init for trial in found] == ["paper", "fast"]
    assert all(trial.supervision and trial.drop_path == 0.2 for trial in found)


def saving_every_update(load: Any) -> Any:
    return lambda recipe, words: load(recipe, [*words, "save_every=1"])


def test_damaged_lines_are_skipped_and_counted(study: ModuleType, tmp_path: Path) -> None:
    path, good = tmp_path / "results.jsonl", result(study, 70.0)
    other = result(study, 80.0, init="fast").model_dump_json()
    path.write_text(f"{good.model_dump_json()}\n[3]\n{other.replace('80.0', '800.0')}\n\0\0\n{other[:-9]}")
    console = quiet()
    assert study.read_results(path, console) == {good.trial: good}
    assert "skipped damaged lines: 4" in console.file.getvalue()


def test_differences_pair_equal_seeds(study: ModuleType) -> None:
    paper = [result(study, 70.0 + seed, seed=seed) for seed in (0, 1, 3)]
    fast = [result(study, accuracy, seed=seed, init="fast") for seed, accuracy in ((3, 73.0), (2, 10.0), (0, 71.5))]
    paired = study.Paired.of(fast, paper)
    assert paired.differences == (1.5, 0.0)
    assert str(paired) == "0.75 ± 1.06, ahead in 1 of 2"


def test_runs_are_compared_at_equal_learning_rates(study: ModuleType, tmp_path: Path) -> None:
    rates = (study.LEARNING_RATE, 0.001)
    trials = [next(study.planned("revcol_vit", "4", 500, 1, False, 0.0, rate)) for rate in rates]
    assert [study.configured(trial, tmp_path, tmp_path).optimizer.lr for trial in trials] == list(rates)
    assert len(study.groups({trial: result(study, 70.0) for trial in trials})) == 2


def test_table_compares_with_paper_and_convnext(study: ModuleType) -> None:
    runs = [result(study, 60.0), result(study, 62.5, init="fast")]
    runs += [result(study, 61.0, init=init, model="convnext", columns=1) for init in ("paper", "fast")]
    runs += [result(study, 99.0, init="fast", updates=1000, seed=5)]
    shown = study.table({run.trial: run for run in runs})
    columns = {column.header: list(column.cells) for column in shown.columns}
    assert columns["model"] == ["convnext, 1 column"] * 2 + ["revcol, 4 columns"] * 3
    assert columns["minus paper"] == ["", "0.00, ahead in 0 of 1", "", "2.50, ahead in 1 of 1", ""]
    assert columns["minus ConvNeXt"] == ["", "", "-1.00, ahead in 0 of 1", "1.50, ahead in 1 of 1", ""]


def test_networks_of_all_column_counts_have_equal_size(study: ModuleType, tmp_path: Path) -> None:
    data = ImageData(None, None, tuple("0123456789"), (1, 32, 32), (0.3,), (0.3,))
    trials = [settings(study, columns=count) for count in study.SHAPES]
    trials.append(settings(study, model="convnext", columns=1))
    sizes = [study.size_of(study.configured(trial, tmp_path, tmp_path), data) for trial in trials]
    for kind in ("parameters", "macs"):
        values = [getattr(size, kind) for size in sizes]
        assert max(values) <= 1.02 * min(values)


@pytest.mark.parametrize("model", ["convnext", "revcol", "revcol_vit"])
def test_only_gains_and_layer_scales_differ_between_initializations(
    study: ModuleType, tmp_path: Path, model: str
) -> None:
    nets = []
    for init in ("paper", "fast"):
        trial = settings(study, model=model, init=init, columns=1 if model == "convnext" else 4)
        config = study.configured(trial, tmp_path, tmp_path)
        torch.manual_seed(0)
        nets.append(timm.create_model(config.model.timm, **config.model.options).state_dict())
    paper, fast = nets
    differing = {name for name in paper if not torch.equal(paper[name], fast[name])}
    assert differing == {name for name in paper if name.endswith((".gain.weight", ".scale.gamma"))}
    assert differing


@pytest.mark.parametrize(
    ("changes", "code", "name"),
    [
        ({"models": "revcol,resnet"}, "unknown-choice", "--models"),
        ({"models": ""}, "unknown-choice", "--models"),
        ({"columns": "5"}, "unknown-choice", "--columns"),
        ({"updates": 501}, "not-divisible", "--updates 501"),
        ({"learning_rate": 0.0}, "out-of-range", "--learning-rate 0.0"),
        ({"updates": 6}, "wrong-length", "5 updates, not for 6"),
        ({"report": True}, "missing-file", "results.jsonl"),
    ],
)
def test_invalid_options_are_errors(
    study: ModuleType, files: Path, tmp_path: Path, changes: dict[str, Any], code: str, name: str
) -> None:
    call = {"output": tmp_path / "results.jsonl", "models": "revcol", "columns": "4", "updates": UPDATES, "seeds": 1}
    options = {"supervision": False, "drop_path": 0.0, "root": files, "report": False}
    with raises_error(TrainingError, code=code, names=[name]):
        study.main(**call | options | changes)
    assert not (tmp_path / "results.jsonl").exists()
