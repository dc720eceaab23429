"""`examples/experiments/fashion_mnist.py` on generated idx files: training, interruption, resuming and comparison."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import timm

from tests.support.errors import raises_error
from tests.support.fashion_mnist import QUICK, command, environment, make_files, output_of, rows, script, started
from vision.config.learning import SupervisionConfig
from vision.data.dataset import ImageData
from vision.errors import TrainingError
from vision.models.architecture import RevCol
from vision.supervision.task import SupervisionTask

ARGUMENTS = ("--seeds", 1, "epochs=2", *QUICK)
FOLDERS = {"ConvNeXt": "convnext-0", "RevCol": "revcol-0", "RevCol, supervised": "revcol-supervised-0"}


@pytest.fixture
def fashion(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "fashion_mnist")


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script(monkeypatch, "seed_runner")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("fashion-mnist"))


def test_stopped_experiment_resumes(fashion: ModuleType, runner: ModuleType, files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ("--root", files, "--output", output, *ARGUMENTS)
    process = started("fashion_mnist", *words)
    while not list(output.glob("*/checkpoints/step-*.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    with raises_error(TrainingError, code="output-in-use", names=str(output)), runner.locked(output):
        pass
    process.send_signal(signal.SIGTERM)
    assert "the same command again to resume" in output_of(process, 128 + signal.SIGTERM)

    text = output_of(started("fashion_mnist", *words))
    found = rows(text)
    assert list(found) == list(FOLDERS)
    for name, (_, _, _, accuracy, minutes) in found.items():
        assert float(accuracy.removesuffix(" %")) > 60  # chance level is 10 %
        state = json.loads((output / FOLDERS[name] / "state.json").read_text())
        assert state["cpu_seconds"] > 0
        assert minutes == f"{state['cpu_seconds'] / 60:.1f}"
    logs = {path: path.read_text() for path in output.glob("*/train.log")}
    assert len(logs) == 3
    assert any("Stopped by SIGTERM" in log and "Resumed" in log for log in logs.values())
    picture = output / "fashion.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"

    picture.unlink()
    assert rows(output_of(started("fashion_mnist", *words))) == found  # finished runs are shown, not repeated
    assert {path: path.read_text() for path in output.glob("*/train.log")} == logs
    assert picture.exists()
    with raises_error(TrainingError, code="settings-differ", names="convnext-0"):
        runner.planned(fashion.MODELS, "ConvNeXt", 0, ["epochs=6"], output)


def test_failed_run_is_a_one_line_error(files: Path, tmp_path: Path) -> None:
    words = ("--root", files, "--output", tmp_path, *ARGUMENTS, "optimizer.lr=1e30")
    text = output_of(started("fashion_mnist", *words, forks=False), 1)
    assert re.fullmatch(
        r"error: \w+, seed 0 ended with code 1: error: the loss is nan in epoch 1, .*train\.log\n", text
    )


def test_missing_data_is_an_error(tmp_path: Path) -> None:
    words = command("fashion_mnist", "--root", tmp_path, "--output", tmp_path / "run")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path} has no train-images-idx3-ubyte.gz. Install Debian's package dataset-fashion-mnist (apt-get "
        "install dataset-fashion-mnist), or put the four idx files into a directory and pass it as --root\n"
    )
    assert not (tmp_path / "run").exists()


def test_models_have_equal_size_and_the_same_blocks(fashion: ModuleType, runner: ModuleType, tmp_path: Path) -> None:
    data = ImageData(None, None, tuple("0123456789"), (1, 32, 32), (0.3,), (0.3,))
    runs = [runner.planned(fashion.MODELS, name, 0, fashion.BUDGET, tmp_path) for name in fashion.MODELS]
    sizes = {run.model: runner.size_of(run.config, data) for run in runs}
    runner.require_equal(sizes, parameters=fashion.EQUAL, macs=fashion.EQUAL)
    for kind in ("parameters", "macs"):
        values = [getattr(size, kind) for size in sizes.values()]
        assert max(values) <= 1.02 * min(values)
    nets: dict[str, RevCol] = {}
    for run in runs:
        nets[run.model] = cast(RevCol, timm.create_model("test_revcol", in_chans=1, **run.config.model.options))
        nets[run.model].reset_classifier(10)
    for name, net in nets.items():
        assert sizes[name].parameters == sum(weight.numel() for weight in net.parameters())
    blocks = {
        name: {type(module) for module in net.modules() if "Block" in type(module).__name__}
        for name, net in nets.items()
    }
    assert len(blocks["RevCol"]) == 1
    assert blocks["ConvNeXt"] == blocks["RevCol"]
    assert [net.columns.graph.columns for net in nets.values()] == [1, 4, 4]
    assert [run.config.supervision for run in runs] == [None, None, SupervisionConfig()]
    task = SupervisionTask(nets["RevCol, supervised"], SupervisionConfig(), mean=(0.3,), std=(0.3,), verbose=False)
    assert sizes["RevCol, supervised"].with_heads == sum(weight.numel() for weight in task.parameters())

    sizes["RevCol"] = sizes["RevCol"]._replace(macs=int(1.03 * sizes["RevCol"].macs))
    with raises_error(TrainingError, code="conflicting-values", names=["macs", "2%"]):
        runner.require_equal(sizes, parameters=fashion.EQUAL, macs=fashion.EQUAL)


def test_mean_and_standard_deviation(runner: ModuleType) -> None:
    assert runner.spread([87.0, 90.0, 93.0], 2) == "90.00 ± 3.00"
    assert runner.spread([87.0], 1) == "87.0"
