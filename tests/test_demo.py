"""`make demo`, cut down to one epoch of a net of two columns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def demo(*overrides: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "epochs=1", "schedule.warmup_epochs=0.5", *overrides]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
def test_demo(tmp_path):
    output = tmp_path / "demo"
    for columns, factor in ((2, 5), (3, 8)):  # the second call begins afresh, although its net is another one
        result = demo(f"output={output}", f"model.columns={columns}", "batch_size=144")
        assert result.returncode == 0, result.stderr
        said = result.stdout
        assert f"{columns} reversible columns" in said
        assert "Resumed" not in said
        assert float(re.search(r"validation accuracy\W+([\d.]+) %", said)[1]) > 20  # a guess is right in 10 %
        assert float(re.search(r"ratio\W+([\d.]+) times less", said)[1]) > factor
        assert "equal bit for bit" in said
        assert (output / "demo.png").read_bytes()[:4] == b"\x89PNG"
        for path in re.findall(r"(?:picture|best weights) +(\S+)", said):
            assert Path(path).exists()


def test_demo_says_what_is_wrong(tmp_path):
    result = demo(f"output={tmp_path / 'demo'}", "epoch=1")
    assert result.returncode == 1
    assert result.stderr == "error: command line: epoch: unknown key (value 1). Did you mean epochs?\n"
