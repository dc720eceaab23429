"""Every place that reads checkpoints refuses what could run code, and none changes what the process allows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nlp.data.corpus import TranslationError
from nlp.evaluation.checkpoint_averaging import average
from revnets import SpecError
from revnets.analysis.gains import read_gains
from tests.support import forked_programs
from tests.support.errors import raises_error
from vision.checkpoints import manager, reader
from vision.checkpoints.layout import KEYS
from vision.errors import CheckpointError
from vision.weights import files

READERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "gains": (lambda path: read_gains(str(path)), SpecError),
    "checkpoints": (reader.read, CheckpointError),
    "weights": (files.read, CheckpointError),
    "averaging": (lambda path: average([path], path.with_name("average.pt")), TranslationError),
}
ALLOWED = torch.serialization.get_safe_globals


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def content(**changes: Any) -> dict[str, Any]:
    """What all four read."""
    state = dict.fromkeys(KEYS) | {"format": manager.FORMAT, "progress": {"step": 1}}
    return state | {"model": {"cells.1.0.gain.weight": torch.full((3,), 0.5)}, **changes}


@pytest.mark.parametrize("reader", READERS)
def test_code_is_refused_and_not_run(tmp_path, reader):
    read, error = READERS[reader]
    before = set(ALLOWED())
    torch.save(content(), tmp_path / "good.pt")
    read(tmp_path / "good.pt")
    torch.save(content(config=Trap(tmp_path / "trap")), tmp_path / "bad.pt")
    with raises_error(error, code="unsafe-file", names=["bad.pt", "mkdir"]) as caught:
        read(tmp_path / "bad.pt")
    assert "add_safe_globals" not in str(caught.value)
    assert not (tmp_path / "trap").exists()
    assert set(ALLOWED()) == before


@pytest.mark.parametrize("reader", READERS)
def test_the_same_failure_has_the_same_code_everywhere(tmp_path, reader):
    read, error = READERS[reader]
    torch.save(content(), tmp_path / "good.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-200])
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, code in (("cut.pt", "damaged-file"), ("text.pt", "wrong-format")):
        with raises_error(error, code=code, names=name):
            read(tmp_path / name)


def test_imports_allow_nothing():
    """torch itself allows its DTensor and the like when they are imported."""
    ours = "revnets.analysis.gains, vision.weights.files, nlp.cli, nlp.evaluation.checkpoint_averaging"
    code = (
        "import sys, timm, torch, torch.distributed.tensor; before = set(torch.serialization.get_safe_globals()); "
        f"import revnets, vision, nlp, {ours}; assert 'fairseq' not in sys.modules; "
        "print(set(torch.serialization.get_safe_globals()) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_fairseq_may_read_its_own_checkpoints_where_it_loads_the_models(tmp_path):
    pytest.importorskip("fairseq")
    code = (
        "import argparse, sys, torch; torch.save({'args': argparse.Namespace(lr=1)}, sys.argv[1]); "
        "import nlp.models.revcol_transformer; from fairseq.checkpoint_utils import load_checkpoint_to_cpu; "
        "print(torch.load(sys.argv[1])['args'].lr)"
    )
    done = forked_programs.run([sys.executable, "-c", code, tmp_path / "a.pt"])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1"
