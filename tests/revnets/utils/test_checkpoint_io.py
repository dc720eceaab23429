"""The reader of untrusted checkpoints: what it builds, what it rejects, and what is allowed."""

from __future__ import annotations

import argparse
import os
import pickle
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch._weights_only_unpickler as restricted
from torch import nn

from revnets.utils.checkpoint_io import RECORDS, CheckpointReadError, read_checkpoint
from tests.support.errors import raises_error

ALLOWED = torch.serialization.get_safe_globals


class Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def during_a_read() -> str:
    """Replaced by tests below with a function that runs while a file is read."""
    raise AssertionError("the stand-in was not taken")


@pytest.fixture
def kept() -> Iterator[None]:
    """Restore the list of safe globals of the process."""
    before = ALLOWED()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


CONTENT = {"weights": torch.arange(6.0).view(2, 3), "lr": 0.1, "names": ["a", ("b", None)], 3: torch.tensor(2)}


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
def test_plain_data_and_tensors(tmp_path, is_zip, mmap):
    torch.save(CONTENT, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    found = read_checkpoint(tmp_path / "a.pt", mmap=mmap)
    assert torch.equal(found.pop("weights"), CONTENT["weights"])
    assert found == {name: value for name, value in CONTENT.items() if name != "weights"}


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"weights": CONTENT["weights"]}, tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")["weights"], CONTENT["weights"])


def test_records_are_built(tmp_path):
    """Records of NumPy 2, and with the names of functions in NumPy 1."""
    content = {"args": argparse.Namespace(lr=0.1), "bleu": np.float64(27.3), "counts": np.arange(3)}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    old, new = b"cnumpy.core.multiarray\n", b"cnumpy._core.multiarray\n"
    data = (tmp_path / "a.pt").read_bytes()
    for name, other in (("one.pt", data.replace(new, old)), ("two.pt", data.replace(old, new))):
        (tmp_path / name).write_bytes(other)
        found = read_checkpoint(tmp_path / name, allowed=RECORDS)
        assert found["args"] == content["args"]
        assert (found["bleu"], found["counts"].tolist()) == (27.3, [0, 1, 2])
        with raises_error(CheckpointReadError, code="unsafe-file", names="argparse.Namespace"):
            read_checkpoint(tmp_path / name)


def test_files_that_are_not_checkpoints(tmp_path):
    torch.save(CONTENT, tmp_path / "zip.pt")
    torch.save(CONTENT, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "cut zip.pt").write_bytes((tmp_path / "zip.pt").read_bytes()[:200])
    (tmp_path / "three bytes.pt").write_bytes(b"PK\x03")
    (tmp_path / "cut old.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:40])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    (tmp_path / "text.pt").write_text("columns: 4\n" * 10)
    (tmp_path / "short text.pt").write_text("columns: 4\n")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"lr": list(range(50))}, protocol=2))
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "program.pt")
    for name, code in {
        "none.pt": "missing-file",
        "none.safetensors": "missing-file",
        "zip.pt/none.pt": "missing-file",
        ".": "not-a-file",
        "cut zip.pt": "damaged-file",
        "three bytes.pt": "damaged-file",
        "cut old.pt": "damaged-file",
        "empty.pt": "damaged-file",
        "cut.safetensors": "damaged-file",
        "text.pt": "wrong-format",
        "short text.pt": "wrong-format",
        "pickle.pt": "wrong-format",
        "program.pt": "unsafe-file",
    }.items():
        for mmap in (False, True):
            with raises_error(CheckpointReadError, code=code, names=name) as caught:
                read_checkpoint(tmp_path / name, mmap=mmap)
            assert "weights_only" not in str(caught.value)
            assert caught.value.__suppress_context__


def test_errors_can_be_pickled():
    error = CheckpointReadError("a.pt", "unsafe-file", "it names print")
    other = pickle.loads(pickle.dumps(error))
    assert (str(other), other.code, other.hint) == (str(error), error.code, error.hint)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("command", [os.system, os.mkdir, exec, getattr])
def test_nothing_is_executed(tmp_path, command, is_zip):
    trap = tmp_path / "trap"
    args = {os.system: (f"touch {trap}",), exec: (f"open({str(trap)!r}, 'w')",), getattr: (tmp_path, "touch")}
    content = {"weights": CONTENT["weights"], "deep": [{"er": Calls(command, *args.get(command, (str(trap),)))}]}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=is_zip)
    for allowed in ((), RECORDS):
        with raises_error(CheckpointReadError, code="unsafe-file", names=command.__name__) as caught:
            read_checkpoint(tmp_path / "a.pt", allowed=allowed)
        assert "add_safe_globals" not in str(caught.value)
    assert not trap.exists()


def test_unpickling_would_execute_code(tmp_path):
    """Otherwise the test above could not fail."""
    torch.save(Calls(os.mkdir, str(tmp_path / "trap")), tmp_path / "a.pt")
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert (tmp_path / "trap").exists()


@pytest.mark.usefixtures("kept")
def test_safe_globals_of_the_process_have_no_effect_and_are_unchanged(tmp_path):
    torch.serialization.add_safe_globals([argparse.Namespace, (dict, "x.y")])
    before = set(ALLOWED())
    torch.save({"args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    torch.save({"lr": 0.1}, tmp_path / "plain.pt")
    with raises_error(CheckpointReadError, code="unsafe-file", names="argparse.Namespace"):
        read_checkpoint(tmp_path / "a.pt")
    assert set(ALLOWED()) == before
    assert read_checkpoint(tmp_path / "plain.pt", allowed=RECORDS) == {"lr": 0.1}
    assert read_checkpoint(tmp_path / "a.pt", allowed=RECORDS)["args"].lr == 0.1
    assert set(ALLOWED()) == before
    assert torch.load(tmp_path / "a.pt", weights_only=True)["args"].lr == 0.1  # other safe globals stay


@pytest.mark.usefixtures("kept")
def test_allowed_classes_apply_to_one_call(tmp_path):
    torch.serialization.clear_safe_globals()  # other tests may have imported the fairseq plug-in
    torch.save({"args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pt")
    read_checkpoint(tmp_path / "a.pt", allowed=[argparse.Namespace])
    with raises_error(CheckpointReadError, code="unsafe-file"):
        read_checkpoint(tmp_path / "a.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "a.pt", weights_only=True)


@pytest.mark.usefixtures("kept")
def test_other_threads_are_unaffected(tmp_path):
    """Another thread neither gets what this call allows nor loses what it has allowed."""
    torch.serialization.add_safe_globals([argparse.Namespace])
    torch.save({"theirs": argparse.Namespace(lr=0.1)}, tmp_path / "theirs.pt")
    torch.save({"ours": Calls(during_a_read)}, tmp_path / "ours.pt")
    found: dict[str, object] = {}

    def other() -> None:
        found["theirs"] = torch.load(tmp_path / "theirs.pt", weights_only=True)
        try:
            torch.load(tmp_path / "ours.pt", weights_only=True)
        except pickle.UnpicklingError as error:
            found["refused"] = "during_a_read" in str(error)

    def stand_in() -> str:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return "taken"

    allowed = [(stand_in, f"{__name__}.during_a_read")]
    assert read_checkpoint(tmp_path / "ours.pt", allowed=allowed) == {"ours": "taken"}
    assert found == {"theirs": {"theirs": argparse.Namespace(lr=0.1)}, "refused": True}


def test_torch_load_is_unchanged(tmp_path):
    """Reading changes neither the safe globals of torch nor the functions of its reader."""
    before = dict(vars(restricted))
    torch.save(CONTENT, tmp_path / "a.pt")
    read_checkpoint(tmp_path / "a.pt", allowed=RECORDS)
    assert vars(restricted) == before


@pytest.mark.parametrize("kind", ["a long name", "links in a circle"])
def test_invalid_path_is_not_a_damaged_file(tmp_path, kind):
    path = tmp_path / ("a" * 300 + ".pt" if kind == "a long name" else "loop.pt")
    if kind == "links in a circle":
        path.symlink_to(path)
    with raises_error(CheckpointReadError, code="unreadable-file", names=path.name):
        read_checkpoint(path)
