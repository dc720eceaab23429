"""Weight files: nothing in them is executed, writing is atomic, and errors are one line."""

from __future__ import annotations

import builtins
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import typer
from typer.testing import CliRunner

from revnets import SpecError
from tests.support import official_reference as official
from tests.support.errors import raises_error
from tests.support.official_reference import TEST
from vision.cli import main
from vision.errors import CheckpointError
from vision.weights.convert import convert_file
from vision.weights.files import read

# ------------------------------------------------------------------------------------------------- nothing is executed


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("where", ["config", "model", "optimizer"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "posix.system"), (builtins.exec, "exec"), (Path, "pathlib"), (getattr, "getattr")],
)
def test_malicious_file_is_refused(function, name: str, where: str, is_zip: bool, tmp_path) -> None:
    mark = tmp_path / "executed"
    arguments = {os.system: f"touch {mark}", builtins.exec: f"open({str(mark)!r}, 'w')", Path: str(mark)}
    args = (tmp_path, "touch") if function is getattr else (arguments[function],)
    content = {"model": official.random_state(TEST), "optimizer": {}, "config": None}
    content[where] = {"deep": [Runs(function, *args)]}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=is_zip)
    bad = tmp_path / "bad.pth"
    with raises_error(CheckpointError, code="unsafe-file", source=bad, names=name):
        convert_file(bad, tmp_path / "ours.safetensors")
    with raises_error(CheckpointError, code="unsafe-file", source=bad):
        timm.create_model("test_revcol", pretrained=True, pretrained_cfg_overlay={"file": str(bad)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pth"]


def test_malicious_file_of_these_tests_is_malicious(tmp_path) -> None:
    """Or the test above could not fail."""
    torch.save(Runs(os.system, f"touch {tmp_path / 'executed'}"), tmp_path / "bad.pth")
    torch.load(tmp_path / "bad.pth", weights_only=False)
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old format"])
def test_what_the_official_trainer_saves_is_read(is_zip: bool, tmp_path) -> None:
    with official.yacs() as CfgNode:
        config = CfgNode({"MODEL": CfgNode({"NAME": "tiny"}), "AUG": [0.8, None]})
        content = {
            "model": {"a": torch.arange(3.0)},
            "input": input,
            "config": config,
            "max_accuracy": np.float64(82.2),
        }
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(Exception, match=r"weights_only|Weights only"):  # torch alone refuses it
            torch.load(tmp_path / "a.pth")
    found = read(tmp_path / "a.pth")
    assert torch.equal(found["model"]["a"], torch.arange(3.0))
    assert found["config"] == {"MODEL": {"NAME": "tiny"}, "AUG": [0.8, None]}
    assert found["input"] is not input
    with pytest.raises(Exception, match=r"weights_only|Weights only"):  # the allow-list is restored
        torch.load(tmp_path / "a.pth")


def test_the_global_allow_list_is_neither_used_nor_changed(tmp_path) -> None:
    """The package nlp, for one, allows numbers of NumPy, for which there is a stand-in here."""
    number = np.float64(82.2)
    others = [np.dtype, type(number.dtype), number.__reduce__()[0]]
    before = torch.serialization.get_safe_globals()
    torch.save({"model": {"a": torch.arange(3.0)}, "max_accuracy": number}, tmp_path / "a.pth")
    torch.serialization.add_safe_globals(others)
    try:
        assert torch.load(tmp_path / "a.pth")["max_accuracy"] == number
        assert read(tmp_path / "a.pth")["max_accuracy"] != number
        assert set(others) <= set(torch.serialization.get_safe_globals())
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


# --------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 1000, 50_000])
def test_damaged_files(name: str, keep: int, tmp_path) -> None:
    source = official.save_classification(tmp_path / "good.pth", official.random_state(TEST))
    if name.endswith(".safetensors"):
        convert_file(source, tmp_path / "good.safetensors")
        source = tmp_path / "good.safetensors"
    (tmp_path / name).write_bytes(source.read_bytes()[:keep])
    with raises_error(CheckpointError, code="damaged-file", source=tmp_path / name):
        convert_file(tmp_path / name, tmp_path / "ours.safetensors")


def test_wrong_paths(tmp_path) -> None:
    source = official.save_classification(tmp_path / "good.pth", official.random_state(TEST))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pth").write_text("no weights\n")
    (tmp_path / "there.safetensors").write_text("precious")
    target = tmp_path / "ours.safetensors"
    for name, code in (
        ("none.pth", "missing-file"),
        ("none.safetensors", "missing-file"),
        ("folder", "not-a-file"),
        ("text.pth", "wrong-format"),
    ):
        with raises_error(CheckpointError, code=code, source=tmp_path / name):
            convert_file(tmp_path / name, target)
    there = tmp_path / "there.safetensors"
    with raises_error(CheckpointError, code="file-exists", source=there):
        convert_file(source, there)
    assert (tmp_path / "there.safetensors").read_text() == "precious"
    with raises_error(CheckpointError, code="wrong-format", source=source, names="official"):
        convert_file(source, tmp_path / "again.pth")
    with raises_error(CheckpointError, code="unwritable-file", source=tmp_path / "text.pth" / "ours.safetensors"):
        convert_file(source, tmp_path / "text.pth" / "ours.safetensors")


@pytest.fixture
def small_disk():
    """No file can grow beyond 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["new.safetensors", "new.pth"])
def test_full_disk_leaves_nothing(name: str, tmp_path, request) -> None:
    source = official.save_classification(tmp_path / "good.pth", official.random_state(TEST))
    if name.endswith(".pth"):
        convert_file(source, tmp_path / "good.safetensors")
        source.unlink()
        source = tmp_path / "good.safetensors"
    request.getfixturevalue("small_disk")
    with raises_error(CheckpointError, code="unwritable-file", source=tmp_path / name):
        convert_file(source, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


# ------------------------------------------------------------------------------------------------------- the command

app = typer.Typer()
app.command("convert")(main.convert)


def call(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})
    if isinstance(result.exception, SpecError):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_command(tmp_path) -> None:
    source = official.save_classification(
        tmp_path / "official.pth", official.random_state(TEST), official.random_state(TEST, seed=1)
    )
    code, out, err = call(source, tmp_path / "new" / "ours.safetensors", "--weights", "ema")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"test_revcol: {len(official.shapes(TEST))} tensors read"
    code, _, err = call(tmp_path / "new" / "ours.safetensors", tmp_path / "mm.pth", "--layout", "segmentation")
    assert (code, err) == (0, "")
    expected = official.random_state(TEST, seed=1)["stem.0.weight"]
    assert torch.equal(read(tmp_path / "mm.pth")["state_dict"]["backbone.stem.0.weight"], expected)


def test_command_lists_what_does_not_fit(tmp_path) -> None:
    source = official.save_classification(tmp_path / "official.pth", official.random_state(TEST))
    code, out, err = call(source, tmp_path / "x.safetensors", "--model", "test_revcol_huge")
    assert (code, out) == (1, "")
    lines = err.splitlines()
    assert "missing subnet1.level0.fusion.up2.channel_reschedule.0.weight" in lines
    assert lines[-1].startswith(f"error: {source}: not the weights of test_revcol_huge: ")
    assert call(source, tmp_path / "x.safetensors", "--model", "test_revcol_huge", "--allow", "*")[0] == 0


def test_command_refuses_unknown_suffixes(tmp_path) -> None:
    with raises_error(code="unknown-suffix", key="TARGET", names=["x.bin", ".safetensors"]):
        call(tmp_path / "official.pth", tmp_path / "x.bin")


def test_command_explains_itself() -> None:
    code, out, _ = call("--help")
    assert code == 0
    for word in ("--model", "--weights", "--heads", "--layout", "--allow", "official RevCol checkpoints"):
        assert word in out


def test_command_is_installed(tmp_path) -> None:
    code = "from revnets.cli.main import main; main()"
    command = [sys.executable, "-c", code, "convert", str(tmp_path / "none.pth"), str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'none.pth'}: ")
    assert done.stderr.count("\n") == 1
