"""Checkpoints that declare more data than they contain are refused before fairseq reads them."""

from __future__ import annotations

import os
import pickle
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed (extra nlp)")

from fairseq import checkpoint_utils

import nlp.models.revcol_transformer  # noqa: F401  (registers the check)
from nlp.models.encoder_spec import TRUST

SAVED = {
    "model": {"weight": torch.arange(7.0)},
    "args": Namespace(arch="transformer"),
    "extra_state": {"train_iterator": {"epoch": 3}},
    "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 5}],
}


@pytest.fixture(autouse=True)
def untrusted(monkeypatch):
    monkeypatch.setenv(TRUST, "")


def deflated(path: Path) -> None:
    """A checkpoint with an entry of 4 MiB that takes 4 KB in the file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"model": {}}, protocol=2))
        archive.writestr("archive/data/0", bytes(2**22))


@pytest.mark.parametrize(
    ("write", "code"),
    [
        (deflated, "wrong-format"),
        (lambda path: torch.save({"model": torch.zeros(1).expand(2**40)}, path), "unsafe-file"),
        (lambda path: path.write_bytes(b"PK\x03\x04"), "damaged-file"),
        (os.mkfifo, "not-a-file"),
    ],
)
def test_a_file_that_torch_load_should_not_get(tmp_path, write, code):
    path = tmp_path / "checkpoint.pt"
    write(path)
    with pytest.raises(SystemExit) as caught:
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    assert caught.value.__cause__.code == code
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_of_fairseq_is_loaded_with_overrides(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(SAVED, path)
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path), {"dropout": 0.25})
    assert state["args"].dropout == 0.25
    torch.testing.assert_close(state["model"]["weight"], SAVED["model"]["weight"], rtol=0, atol=0)


@pytest.mark.parametrize("name", [TRUST, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_trusted_file_is_loaded_without_the_check(tmp_path, monkeypatch, name):
    path = tmp_path / "checkpoint.pt"
    torch.save({**SAVED, "mask": torch.eye(3).to_sparse()}, path)
    with pytest.raises(SystemExit):
        checkpoint_utils.load_checkpoint_to_cpu(str(path))
    monkeypatch.setenv(name, "1")
    assert checkpoint_utils.load_checkpoint_to_cpu(str(path))["mask"].is_sparse
