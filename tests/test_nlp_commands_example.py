"""`examples/translate.py` from raw text to the picture, cut down to a few updates."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fairseq")

ROOT = Path(__file__).parents[1]


def translate(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    command = [sys.executable, str(ROOT / "examples" / "translate.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_translate(tmp_path):
    output = tmp_path / "run"
    result = translate("--updates", 4, "--points", 2, "--output", output)
    assert result.returncode == 0, result.stderr
    said = result.stdout
    sizes = [int(text.replace(",", "")) for text in re.search(r"parameters\W+([\d,]+)\W+([\d,]+)", said).groups()]
    assert abs(sizes[0] - sizes[1]) < 0.001 * sizes[0]  # the models are of equal size
    assert re.search(r"BLEU, sacreBLEU\W+\d+\.\d\d\W+\d+\.\d\d", said)
    assert said.count("reference") == 4  # verses that are shown
    assert (output / "translate.png").read_bytes()[:4] == b"\x89PNG"


def test_translate_leaves_other_folders_alone(tmp_path):
    (tmp_path / "precious").touch()
    result = translate("--output", tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path} is there and is not of this script. Give another --output\n"
    assert (tmp_path / "precious").exists()
