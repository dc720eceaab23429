"""`examples/experiments/translate.py` from raw text to the picture, cut down to a few verses and updates."""

from __future__ import annotations

import gzip
import importlib.util
import os
import re
import subprocess
import sys
from itertools import islice

import pytest

from tests.support.paths import ROOT

pytest.importorskip("fairseq")

SCRIPT = ROOT / "examples/experiments/translate.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """The script as a module, with every twentieth verse of its corpus."""
    spec = importlib.util.spec_from_file_location("translate", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "translate", module)
    spec.loader.exec_module(module)
    with gzip.open(module.CORPUS, "rt") as verses, gzip.open(tmp_path / "verses.tsv.gz", "wt") as few:
        few.writelines(islice(verses, 0, None, 20))
    monkeypatch.setattr(module, "CORPUS", tmp_path / "verses.tsv.gz")
    monkeypatch.setattr(module, "DATA", {**module.DATA, "valid": 15, "test": 20, "merges": 300})
    return module


@pytest.mark.slow
def test_translate(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "run"
    script.main(updates=4, points=2, output=output)
    said = capsys.readouterr().out
    sizes = [int(text.replace(",", "")) for text in re.search(r"parameters\W+([\d,]+)\W+([\d,]+)", said).groups()]
    assert abs(sizes[0] - sizes[1]) < 0.001 * sizes[0]  # the models are of equal size
    assert re.search(r"BLEU, sacreBLEU\W+\d+\.\d\d\W+\d+\.\d\d", said)
    assert said.count("reference") == 4  # verses that are shown
    assert (output / "translate.png").read_bytes()[:4] == b"\x89PNG"


def test_translate_leaves_other_folders_alone(tmp_path):
    (tmp_path / "precious").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path} ")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "precious").exists()
