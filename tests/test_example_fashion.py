"""`examples/fashion.py` on made-up images in idx format: trained, stopped, gone on with, and compared for real."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import cast

import pytest
import timm
import torch
from test_vision_idx import idx

from vision.errors import DataError
from vision.imageset import ImageData
from vision.model import RevCol
from vision.supervision import SupervisionConfig
from vision.task import SupervisionTask

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "fashion.py"
QUICK = ("--seeds", 1, "epochs=4", "batch_size=32", "data.train_samples=320", "schedule.warmup_epochs=0.5")


@pytest.fixture
def fashion(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("fashion", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fashion", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes, each a pattern of its own under noise: easy, but nothing that an untrained net could tell."""
    root = tmp_path_factory.mktemp("fashion-mnist")
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2, (10, 7, 7), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    for name, count in (("train", 320), ("t10k", 100)):
        labels = torch.randperm(count, generator=generator) % 10
        noise = torch.randint(0, 80, (count, 28, 28), generator=generator)
        idx(root, f"{name}-images-idx3-ubyte", (170 * patterns[labels] + noise).byte(), zipped=name == "train")
        idx(root, f"{name}-labels-idx1-ubyte", labels.byte(), zipped=name == "t10k")
    return root


def started(*words: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def said(process: subprocess.Popen[str], code: int = 0) -> str:
    """What it prints until it ends with that code: all, or of an error its line."""
    out, errors = process.communicate(timeout=280)
    assert process.returncode == code, errors
    return errors if code == 1 else out


def rows(text: str) -> dict[str, list[str]]:
    """The cells of the table, by model."""
    cells = [[cell.strip() for cell in line.strip("│\n").split("│")] for line in text.splitlines() if "│" in line]
    return {name: rest for name, *rest in cells}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fashion_is_stopped_and_goes_on(fashion: ModuleType, files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    words = ("--root", files, "--output", output, *QUICK)
    process = started(*words)
    while not list(output.glob("*/checkpoints/step-*.pt")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    with pytest.raises(DataError, match="are still going on"), fashion.locked(output):
        pass
    process.send_signal(signal.SIGTERM)
    assert "the same command goes on" in said(process, 128 + signal.SIGTERM)

    text = said(started(*words))
    found = rows(text)
    assert list(found) == ["ConvNeXt", "RevCol", "RevCol, supervised"]
    for _, _, _, accuracy, minutes in found.values():
        assert float(accuracy.removesuffix(" %")) > 60  # a guess is right in 10 %
        assert float(minutes) > 0
    logs = {path: path.read_text() for path in output.glob("*/train.log")}
    assert len(logs) == 3
    assert any("Stopped by SIGTERM" in log and "Resumed" in log for log in logs.values())
    picture = output / "fashion.png"
    assert picture.read_bytes()[:4] == b"\x89PNG"

    picture.unlink()
    assert rows(said(started(*words))) == found  # what is finished is shown again, and not run again
    assert {path: path.read_text() for path in output.glob("*/train.log")} == logs
    assert picture.exists()
    with pytest.raises(DataError, match=r"convnext-0 holds a run with other settings\. Give the same ones again"):
        fashion.planned("ConvNeXt", 0, ["epochs=6"], output)


@pytest.mark.slow
def test_a_run_that_fails_is_told_in_a_line(files: Path, tmp_path: Path) -> None:
    words = ("--root", files, "--output", tmp_path, *QUICK, "optimizer.lr=1e30")
    text = said(started(*words), 1)
    assert re.fullmatch(
        r"error: \w+, seed 0 ended with code 1: error: the loss is nan in epoch 1, .*train\.log\n", text
    )


def test_without_data(tmp_path: Path) -> None:
    text = said(started("--root", tmp_path, "--output", tmp_path / "run"), 1)
    assert text == (
        f"error: {tmp_path} has no train-images-idx3-ubyte.gz. Install Debian's package dataset-fashion-mnist (apt-get "
        "install dataset-fashion-mnist), or put the four idx files into a folder and give it with --root\n"
    )
    assert not (tmp_path / "run").exists()


def test_models_are_of_equal_size_and_of_the_same_blocks(fashion: ModuleType, tmp_path: Path) -> None:
    data = ImageData(None, None, tuple("0123456789"), (1, 32, 32), (0.3,), (0.3,))
    runs = [fashion.planned(name, 0, fashion.BUDGET, tmp_path) for name in fashion.MODELS]
    sizes = {run.model: fashion.size_of(run.config, data) for run in runs}
    fashion.require_equal(sizes)
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
    with pytest.raises(DataError, match="equal macs within 2%"):
        fashion.require_equal(sizes)


def test_mean_and_standard_deviation(fashion: ModuleType) -> None:
    assert fashion.spread([87.0, 90.0, 93.0], 2) == "90.00 ± 3.00"
    assert fashion.spread([87.0], 1) == "87.0"
