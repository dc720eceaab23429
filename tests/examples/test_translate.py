"""`examples/experiments/translate.py` from raw text to the figure, with a few verses and updates."""

from __future__ import annotations

import gzip
import os
import re
import subprocess
import sys
from itertools import islice

import pytest

from tests.support import forked_programs
from tests.support.paths import ROOT

pytest.importorskip("fairseq")

SCRIPT = ROOT / "examples/experiments/translate.py"


SHORT = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(SCRIPT.parent)!r})
import translate
translate.CORPUS = Path(sys.argv[1])
translate.DATA = {{**translate.DATA, "valid": 15, "test": 20, "merges": 100}}
translate.main(updates=4, points=2, output=Path(sys.argv[2]))
"""


def test_translate(tmp_path):
    """Run on every twentieth verse of the corpus, with forked fairseq commands."""
    corpus = ROOT / "examples/data/kjv-elberfelder-short.en-de.tsv.gz"
    with gzip.open(corpus, "rt") as verses, gzip.open(tmp_path / "verses.tsv.gz", "wt") as few:
        few.writelines(islice(verses, 0, None, 20))
    output = tmp_path / "run"
    words = [sys.executable, "-c", SHORT, tmp_path / "verses.tsv.gz", output]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = forked_programs.run(words, env=environment, forks=True)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    sizes = [int(text.replace(",", "")) for text in re.search(r"parameters\W+([\d,]+)\W+([\d,]+)", printed).groups()]
    assert abs(sizes[0] - sizes[1]) < 0.001 * sizes[0]  # equal size
    assert re.search(r"BLEU, sacreBLEU\W+\d+\.\d\d\W+\d+\.\d\d", printed)
    assert printed.count("reference") == 4  # printed verses
    assert (output / "translate.png").read_bytes()[:4] == b"\x89PNG"


def test_translate_does_not_delete_other_directories(tmp_path):
    (tmp_path / "precious").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path} ")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "precious").exists()
