"""Files of weights: nothing in them is run, none is left half-written, timm finds them, and errors are one line."""

from __future__ import annotations

import builtins
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import typer
import vision_official as official
from torch.testing import assert_close
from typer.testing import CliRunner
from vision_official import TEST, Net

from revnets import SpecError
from vision import cli
from vision.convert import convert_file
from vision.errors import CheckpointError
from vision.official import MismatchError
from vision.revcol import HUGE, RELEASE
from vision.weights import read

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
    with pytest.raises(CheckpointError, match=rf"refused, it names \S*{name}\S*, which no weights need") as caught:
        convert_file(tmp_path / "bad.pth", tmp_path / "ours.safetensors")
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="refused"):
        timm.create_model("test_revcol", pretrained=True, pretrained_cfg_overlay={"file": str(tmp_path / "bad.pth")})
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
    with pytest.raises(Exception, match=r"weights_only|Weights only"):  # what was allowed is so no longer
        torch.load(tmp_path / "a.pth")


# --------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("keep", [0, 3, 1000, 50_000])
def test_damaged_files(name: str, keep: int, tmp_path) -> None:
    source = official.save_classification(tmp_path / "good.pth", official.random_state(TEST))
    if name.endswith(".safetensors"):
        convert_file(source, tmp_path / "good.safetensors")
        source = tmp_path / "good.safetensors"
    (tmp_path / name).write_bytes(source.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"damaged|refused|not plain data"):
        convert_file(tmp_path / name, tmp_path / "ours.safetensors")


def test_wrong_paths(tmp_path) -> None:
    source = official.save_classification(tmp_path / "good.pth", official.random_state(TEST))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pth").write_text("no weights\n")
    (tmp_path / "there.safetensors").write_text("precious")
    target = tmp_path / "ours.safetensors"
    for path, words in (("none.pth", "no such file"), ("none.safetensors", "no such file"), ("folder", "a folder")):
        with pytest.raises(CheckpointError, match=words):
            convert_file(tmp_path / path, target)
    with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint"):
        convert_file(tmp_path / "text.pth", target)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_file(source, tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "precious"
    with pytest.raises(CheckpointError, match="is in the official layout already"):
        convert_file(source, tmp_path / "again.pth")
    with pytest.raises(CheckpointError, match="cannot be written"):
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
    with pytest.raises(CheckpointError, match=r"cannot be written \(.*\)\. Free some space") as caught:
        convert_file(source, tmp_path / name)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


# ------------------------------------------------------------------------------------------------------- the command

app = typer.Typer()
app.command("convert")(cli.convert)


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
    assert lines[-1].startswith(f"error: {source}: no test_revcol_huge: ")
    assert call(source, tmp_path / "x.safetensors", "--model", "test_revcol_huge", "--allow", "*")[0] == 0


def test_command_knows_what_it_can_write(tmp_path) -> None:
    with pytest.raises(SpecError, match=r"x\.bin has no known suffix\. Let it end in \.safetensors"):
        call(tmp_path / "official.pth", tmp_path / "x.bin")


def test_command_explains_itself() -> None:
    code, out, _ = call("--help")
    assert code == 0
    for word in ("--model", "--weights", "--heads", "--layout", "--allow", "official RevCol checkpoints"):
        assert word in out


def test_command_is_installed(tmp_path) -> None:
    code = "from revnets.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", str(tmp_path / "none.pth"), str(tmp_path / "x.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'none.pth'}: there is no such file. Check the path\n"


# ---------------------------------------------------------------------------------------------------- timm finds them


@pytest.fixture(params=["supervised", "plain"])
def checkpoint(request, tmp_path) -> tuple[Path, Net, official.State]:
    net = replace(TEST, supervised=request.param == "supervised")
    state = official.random_state(net)
    return official.save_classification(tmp_path / "official.pth", state, official.random_state(net, 1)), net, state


def logits(state: official.State, net: Net, image: torch.Tensor) -> torch.Tensor:
    return official.forward(state, net, image)[0][-1]


@torch.no_grad()
def test_pretrained_from_a_file(checkpoint) -> None:
    """The raw weights, which the published accuracies are of."""
    path, net, state = checkpoint
    overlay = {"file": str(path), "num_classes": 11}
    model = timm.create_model("test_revcol", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pretrained_from_a_url(checkpoint, tmp_path) -> None:
    """What timm has downloaded before is in its cache, under the last part of the URL."""
    path, net, state = checkpoint
    overlay = {"url": RELEASE + path.name, "num_classes": 11}
    model = timm.create_model("test_revcol", True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path).eval()
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pretrained_is_adapted_as_timm_does(checkpoint) -> None:
    path, net, state = checkpoint
    overlay = {"file": str(path), "num_classes": 11}
    image = torch.randn(2, 1, 64, 64)
    model = timm.create_model("test_revcol", True, in_chans=1, num_classes=3, pretrained_cfg_overlay=overlay).eval()
    assert model(image).shape == (2, 3)
    _, _, levels = official.forward(state, net, image.expand(-1, 3, -1, -1))  # one channel gets the sum of the kernels
    assert_close(model.forward_features(image), levels[-1], atol=1e-5 * levels[-1].abs().max().item(), rtol=1e-5)
    features = timm.create_model("test_revcol", True, features_only=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(features(image), official.forward(state, net, image)[2], strict=True):
        assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


@torch.no_grad()
def test_pretrained_from_ours(checkpoint, tmp_path) -> None:
    path, net, state = checkpoint
    convert_file(path, tmp_path / "ours.safetensors", heads=True)
    overlay = {"file": str(tmp_path / "ours.safetensors"), "num_classes": 11}
    model = timm.create_model("test_revcol", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pretrained_from_a_state_dict(checkpoint) -> None:
    _, net, state = checkpoint
    overlay = {"state_dict": dict(state), "num_classes": 11}
    model = timm.create_model("test_revcol", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)


def test_pretrained_of_another_model_is_refused_in_any_case(checkpoint) -> None:
    """Also with another number of classes, where timm itself would load what fits."""
    path, _, _ = checkpoint
    for overlay in ({"file": str(path), "num_classes": 11}, {"file": str(path)}):
        with pytest.raises(MismatchError, match=r"no test_revcol_huge: (missing|unexpected) subnet"):
            timm.create_model("test_revcol_huge", True, num_classes=5, pretrained_cfg_overlay=overlay)
    with pytest.raises(MismatchError, match="no test_revcol: unexpected subnet3"):
        timm.create_model("test_revcol", True, columns=3, pretrained_cfg_overlay={"file": str(path), "num_classes": 11})


RELEASED = {
    "revcol_tiny": "revcol_tiny_1k.pth",
    "revcol_small": "revcol_small_1k.pth",
    "revcol_base": "revcol_base_1k.pth",
    "revcol_base.in22k": "revcol_base_22k.pth",
    "revcol_base.in22k_ft_in1k": "revcol_base_22k_1kft_224.pth",
    "revcol_base.in22k_ft_in1k_384": "revcol_base_22k_1kft_384.pth",
    "revcol_large": "revcol_large_22k_1kft_224.pth",
    "revcol_large.in22k": "revcol_large_22k.pth",
    "revcol_large.in22k_ft_in1k_384": "revcol_large_22k_1kft_384.pth",
}


@pytest.mark.parametrize("name", [*RELEASED, "revcol_huge"])
def test_released_urls(name: str) -> None:
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.url == (HUGE if name == "revcol_huge" else RELEASE + RELEASED[name])
    assert cfg.num_classes == (21841 if name.endswith("22k") else 1000)
    size = 384 if name.endswith("384") else 640 if name == "revcol_huge" else 224
    assert cfg.input_size == (3, size, size)
    assert (cfg.crop_pct, cfg.crop_mode) == ((0.875, "center") if size == 224 else (1.0, "squash"))
    assert timm.is_model_pretrained(name)


def test_page_lists_the_releases() -> None:
    page = (Path(__file__).parents[1] / "docs" / "weights.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `revcol")
    ]
    listed = {name.strip("`"): (file, int(classes), int(size)) for name, file, classes, size, _ in rows}
    cfgs = {name: timm.models.get_pretrained_cfg(name) for name in timm.list_pretrained("revcol_*")}
    found = {
        name: (cfg.url.split("/")[-1], cfg.num_classes, cfg.input_size[1])
        for name, cfg in cfgs.items()
        if cfg is not None
    }
    assert listed == found


def test_model_without_release_says_so() -> None:
    assert not timm.is_model_pretrained("revcol_xlarge")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_revcol"):
        timm.create_model("test_revcol", pretrained=True)


@pytest.mark.slow
@torch.no_grad()
def test_revcol_tiny_itself(tmp_path) -> None:
    """`create_model` by name alone, with the file that timm would have fetched."""
    net = Net(4, (64, 128, 256, 512), (2, 2, 4, 2), classes=1000, supervised=True)
    state = official.random_state(net)
    official.save_classification(tmp_path / "revcol_tiny_1k.pth", state)
    model = timm.create_model("revcol_tiny", pretrained=True, cache_dir=tmp_path).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = logits(state, net, image)
    assert_close(model(image), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
