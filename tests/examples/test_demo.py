"""`make demo`, with one epoch of networks with two and three columns."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "examples/quickstart/demo.py"


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    demo = runpy.run_path(str(SCRIPT))["main"]
    output = tmp_path / "demo"
    short = ("epochs=1", "schedule.warmup_epochs=0.5", "batch_size=144")
    for columns, factor in ((2, 5), (3, 8)):  # the second call replaces the run of another network
        assert demo([*short, f"output={output}", f"model.columns={columns}"]) == 0
        printed = capsys.readouterr().out
        assert f"{columns} reversible columns" in printed
        assert "Resumed" not in printed
        assert float(re.search(r"validation accuracy\W+([\d.]+) %", printed)[1]) > 20  # chance level is 10 %
        assert float(re.search(r"ratio\W+([\d.]+) times less", printed)[1]) > factor
        assert "equal bit for bit" in printed
        assert (output / "demo.png").read_bytes()[:4] == b"\x89PNG"
        for path in re.findall(r"(?:figure|best weights) +(\S+)", printed):
            assert Path(path).exists()


def test_demo_prints_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert not ended.value.code
    assert "overrides of vision/configs/digits.yaml" in capsys.readouterr().out


def test_demo_reports_unknown_keys(tmp_path):
    command = [sys.executable, str(SCRIPT), f"output={tmp_path / 'demo'}", "epoch=1"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 1
    assert result.stderr == "error: command line: epoch: unknown key (value 1). Did you mean epochs?\n"
