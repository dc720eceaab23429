"""`examples/data_engine/fashion.py` on generated idx files: from raw images to a student and a report on duplicates."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("imagehash")

from tests.support.fashion_mnist import make_files
from tests.support.paths import ROOT


@pytest.fixture
def proof(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "examples/data_engine")
    return importlib.import_module("fashion")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("fashion-mnist"))


def test_every_change_is_planted_and_changes_pixels(proof: ModuleType, files: Path, tmp_path: Path) -> None:
    planted = proof.write_planted(files, tmp_path, searched=3, against=7, planted=5)
    assert sorted(planted.values()) == [f"{number:05d}.png" for number in range(5)]
    assert len(list((tmp_path / "searched").iterdir())) == 8
    assert len(list((tmp_path / "against").iterdir())) == 7
    for copy, original in planted.items():
        pixels = [np.asarray(Image.open(tmp_path / place)) for place in (f"searched/{copy}", f"against/{original}")]
        assert pixels[0].shape == pixels[1].shape == (112, 112)
        assert not np.array_equal(*pixels)


def test_the_data_engine_runs_from_images_to_a_student(
    proof: ModuleType, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(proof.TEACHER, "batch_size", 16)
    monkeypatch.setitem(proof.STUDENT, "batch_size", 16)
    monkeypatch.setitem(proof.RUN["schedule"], "warmup_updates", 10)
    monkeypatch.setattr(proof, "KILLS", 1)
    monkeypatch.setattr(proof, "WORKERS", (1,))
    proof.main(
        files,
        tmp_path,
        images=320,
        labels=40,
        test=50,
        updates=40,
        teacher_updates=40,
        seeds=1,
        searched=30,
        planted=10,
        killed=200,
    )
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["accuracy"][0]["with pseudo-labels"] > 20  # of ten classes
    assert list(results["robustness"]["seconds"]) == ["1"]
    assert results["duplicates"]["recall"]["flip"] == results["duplicates"]["recall"]["jpeg"] == 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
