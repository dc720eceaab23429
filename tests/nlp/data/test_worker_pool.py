"""Worker processes that tokenize and split text do not import torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("sacremoses")

from nlp.data.worker_pool import MOST, default_workers, ordered
from tests.support.paths import ROOT

MODULES = "[name for name in ('torch', 'revnets', 'fairseq') if name in __import__('sys').modules]"
WORK = "__import__('nlp.data.sentence_pairs', fromlist=['x']).tokenized([], ('en', 'de'), True, False)"

SCRIPT = f"""
import torch
import revnets.cli.main
from nlp.data.worker_pool import ordered

if __name__ == "__main__":
    print(set(map(str, ordered(eval, [{f"({WORK}, {MODULES})"!r}] * 20, workers=2))))
"""


@pytest.mark.parametrize("as_module", [False, True])
def test_workers_of_a_command_import_neither_torch_nor_revnets(tmp_path, as_module):
    """The module of the command imports both, like the script that pip installs."""
    (tmp_path / "command.py").write_text(SCRIPT)
    words = ["-m", "command"] if as_module else [str(tmp_path / "command.py")]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=250)
    assert done.stdout.strip() == "{'([], [])'}", done.stderr


def test_the_main_module_is_restored():
    main = sys.modules["__main__"]
    assert list(ordered(abs, range(-20, 0), workers=2)) == list(range(20, 0, -1))
    assert sys.modules["__main__"] is main


def test_the_default_number_of_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(3)), raising=False)
    assert default_workers() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(256)))
    assert default_workers() == MOST
