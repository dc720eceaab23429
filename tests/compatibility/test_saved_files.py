"""Files written by version 0.1.0 are read, and runs continue as in that version.

The files are in data/version_0_1_0/, where README.md describes them. The test uses only commands and public names, so
it does not depend on the layout of modules.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import revnets
import vision  # noqa: F401  (registers the models with timm)
from tests.support import forked_programs
from tests.support.timeouts import HANG
from tests.support.versions import TORCH

DATA = Path(__file__).parent / "data" / "version_0_1_0"
BIN = Path(sys.executable).parent
PARTS = ("model", "ema", "heads", "heads_ema", "optimizer", "scaler")
"""Keys of a checkpoint of `revnets train` that hold tensors."""

needs_fairseq = pytest.mark.skipif(find_spec("fairseq") is None, reason="fairseq is not installed (extra nlp)")


# ---------------------------------------------------------------------------------------------- files and commands


@pytest.fixture
def unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that unpacks an archive into a new directory and makes it the working directory."""

    def unpack(name: str) -> Path:
        folder = tmp_path.resolve()
        with tarfile.open(DATA / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        monkeypatch.chdir(folder)
        return folder

    return unpack


def command(*words: object) -> str:
    """Return the output of `revnets`, run in this process, which has already imported everything."""
    (script,) = entry_points(group="console_scripts", name="revnets")
    shown = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["revnets", *map(str, words)]),
        contextlib.redirect_stdout(shown),
        pytest.raises(SystemExit) as ended,
    ):
        script.load()()
    assert not ended.value.code, shown.getvalue()
    return shown.getvalue()


def program(*words: object) -> None:
    """Run a program of this environment in a separate process."""
    done = forked_programs.run([BIN / str(words[0]), *words[1:]], env=environment())
    assert done.returncode == 0, done.stdout + done.stderr


def pair(*words: object) -> None:
    """Run `revnets` in two processes that train together."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    children = []
    for rank in range(2):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        options = {"env": environment() | variables, "stderr": subprocess.STDOUT}
        children.append(forked_programs.Program([BIN / "revnets", *words], **options))
    try:
        outputs = [child.communicate(timeout=HANG)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# ----------------------------------------------------------------------------------------------------- comparisons


@pytest.fixture(scope="session")
def exact() -> bool:
    """Whether this machine rounds like the one that created the files. If so, tests compare every bit."""
    stored = torch.load(DATA / "probe.pt", weights_only=True)
    return stored["torch"] == str(torch.__version__) and torch.equal(probe(**stored["given"]), stored["result"])


def probe(x: Tensor, weight: Tensor, kernel: Tensor) -> Tensor:
    x = F.conv2d(x, kernel, padding=1, groups=12).permute(0, 2, 3, 1)
    x = F.gelu(F.layer_norm(x, (12,)) @ weight) @ weight.T
    return F.scaled_dot_product_attention(x, x.softmax(-1), x.exp().log1p())


def assert_alike(found: Any, expected: Any, exact: bool, rtol: float = 1e-4, atol: float = 1e-5, at: str = "") -> None:
    """Check that nested data are equal: bit for bit if `exact`, otherwise up to rounding."""
    assert type(found) is type(expected), at
    if isinstance(expected, dict):
        assert list(found) == list(expected), at
        for key in expected:
            assert_alike(found[key], expected[key], exact, rtol, atol, f"{at}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), at
        for index, items in enumerate(zip(found, expected, strict=True)):
            assert_alike(*items, exact, rtol, atol, f"{at}/{index}")
    elif isinstance(expected, Tensor):
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), at
        if exact:
            assert torch.equal(found, expected), at
        else:
            torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, msg=lambda text: f"{at}: {text}")
    elif isinstance(expected, float) and not exact:
        assert found == pytest.approx(expected, rel=rtol, abs=atol), at
    else:
        assert found == expected, at


TRAINED = {"rtol": 1e-2, "atol": 5e-3}
"""Tolerances of trained weights on a machine that rounds differently: updates magnify small differences."""


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without values that depend on the clock."""
    lines = map(json.loads, path.read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def assert_ended_alike(checkpoint: Path, log: Path, expected: Path, exact: bool) -> None:
    """Check that a run ended with the same checkpoint and log as in version 0.1.0."""
    ours, theirs = load(checkpoint), load(expected / "final.pt")
    for part in PARTS:
        assert_alike(ours[part], theirs[part], exact, **TRAINED, at=part)
    assert (ours["config"]["model"], ours["classes"]) == (theirs["config"]["model"], theirs["classes"])
    lines = read_log(log), read_log(expected / "log.jsonl")
    assert [(line["kind"], line["step"]) for line in lines[0]] == [(line["kind"], line["step"]) for line in lines[1]]
    if exact:  # otherwise an image at the boundary of two classes may belong to either
        assert_alike(ours["progress"], theirs["progress"], exact)
        assert lines[0] == lines[1]


# ------------------------------------------------------------------------------------------ runs of `revnets train`


@pytest.mark.parametrize("name", ["digits", "revcol_vit", "supervised"])
def test_resumes_a_run_of_version_0_1_0(unpacked, exact, name):
    folder = unpacked(name)
    command("train", "run/config.yaml")
    assert_ended_alike(
        folder / "run" / "checkpoints" / "step-0000010.pt", folder / "run" / "log.jsonl", folder / "expected", exact
    )


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_resume_a_run_in_shards(unpacked, exact):
    folder = unpacked("shards")
    pair("train", "run/config.yaml")
    command("reshard", "run/checkpoints/step-0000010", "final.pt")
    assert_ended_alike(folder / "final.pt", folder / "run" / "log.jsonl", folder / "expected" / "two", exact)


def test_one_process_resumes_a_run_in_shards(unpacked, exact):
    folder = unpacked("shards")
    command("train", "run/config.yaml", "grad_accum=2", "parallel=ddp", "checkpoint=full")
    final = folder / "run" / "checkpoints" / "step-0000010.pt"
    assert_ended_alike(final, folder / "run" / "log.jsonl", folder / "expected" / "one", exact)


def test_converts_shards_of_version_0_1_0_to_one_file(unpacked):
    folder = unpacked("shards")
    command("reshard", max((folder / "run" / "checkpoints").glob("step-*")), "whole.pt")
    ours, theirs = load(folder / "whole.pt"), load(folder / "expected" / "stopped.pt")
    assert_alike(ours, theirs, exact=True)


def test_converts_a_file_of_version_0_1_0_to_shards(unpacked):
    """The shards contain those that two processes of that version wrote, and also parts of unsharded tensors."""
    folder = unpacked("shards")
    command("reshard", "expected/stopped.pt", "new", "--shards", "2")
    written = max((folder / "run" / "checkpoints").glob("step-*"))
    for name in ("shard-00000-of-00002.pt", "shard-00001-of-00002.pt"):
        ours, theirs = load(folder / "new" / name), load(written / name)
        assert_alike({key: tensor for key, tensor in ours.items() if key in theirs}, theirs, exact=True)


def test_resumed_runs_are_equal_in_all_memory_modes(unpacked):
    """This is true on every machine."""
    folder = unpacked("digits")
    shutil.copytree("run", "other")
    command("train", "run/config.yaml", "memory=exact")
    command("train", "run/config.yaml", "memory=store", "output=other")
    ours, theirs = (load(folder / name / "checkpoints" / "step-0000010.pt") for name in ("run", "other"))
    for part in PARTS:
        assert_alike(ours[part], theirs[part], exact=True, at=part)


@pytest.mark.parametrize("name", ["digits", "shards", "revcol_vit", "supervised"])
def test_evaluates_a_run_of_version_0_1_0(unpacked, exact, name):
    """Metrics of the best checkpoint equal those in the training log."""
    folder = unpacked(name)
    shown = command("eval", "run")
    (line,) = [line for line in read_log(folder / "run" / "log.jsonl") if line["kind"] == "eval"]
    weights = ["raw"] if name == "supervised" else ["raw", "ema"]
    found = {key: re.search(rf"\b{key} +│ +([\d.]+) +│ +([\d.]+) +│ +([\d.]+)", shown) for key in weights}
    for key, match in found.items():
        assert match, shown
        assert float(match[1]) == pytest.approx(line[f"{key}_top1"], abs=0.006 if exact else 1.2)
        assert float(match[3]) == pytest.approx(line[f"{key}_loss"], abs=0.0001 if exact else 0.01)


@pytest.mark.parametrize("name", ["digits", "revcol_vit", "supervised"])
def test_model_of_a_run_loads_its_weights_of_version_0_1_0(unpacked, name):
    state = load(unpacked(name) / "expected" / "final.pt")
    model = dict(state["config"]["model"])
    is_timm = "timm" in model
    net = timm.create_model(model.pop("timm"), num_classes=10, in_chans=1, **model) if is_timm else revnets.build(model)
    net.load_state_dict(state["model"])
    assert_alike(dict(net.state_dict()), dict(state["model"]), exact=True)


# ---------------------------------------------------------------------------------------------------------- weights


def test_converts_official_weights_as_version_0_1_0(unpacked):
    folder = unpacked("weights")
    command("convert", "official.pth", "new.safetensors")
    assert_alike(load_file(folder / "new.safetensors"), load_file(folder / "ours.safetensors"), exact=True)
    facts = [safe_open(folder / name, "pt").metadata() for name in ("new.safetensors", "ours.safetensors")]
    assert facts[0] == facts[1]


def test_converts_weights_of_version_0_1_0_to_the_official_layout(unpacked):
    folder = unpacked("weights")
    command("convert", "ours.safetensors", "new.pth")
    assert_alike(load(folder / "new.pth"), load(folder / "official.pth"), exact=True)


@pytest.mark.parametrize("name", ["ours.safetensors", "official.pth"])
def test_timm_loads_weights_of_version_0_1_0(unpacked, exact, name):
    folder = unpacked("weights")
    expected = load(folder / "expected.pt")
    overlay = {"file": str(folder / name)}
    model = timm.create_model("test_revcol_huge", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    with torch.no_grad():
        assert_alike(model.eval()(expected["image"]), expected["logits"], exact)


# --------------------------------------------------------------------------------------------------------- networks

NETS = ("convnext", "tokens", "revnet", "vectors", "revcol_vit", "sequence")


class OfSum(nn.Sequential):
    """Applies modules in sequence to the sum of the inputs."""

    def forward(self, *reads: Tensor) -> Tensor:
        return super().forward(torch.stack(reads).sum(0))


def build(folder: Path) -> nn.Module:
    torch.manual_seed(0)
    if (folder / "net.yaml").exists():
        return revnets.build(folder / "net.yaml")
    functions = [OfSum(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.1)) for _ in range(7)]
    return revnets.ReversibleSequence(functions, m=3, reads=(1, 2), gain=0.7)


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [tensor for part in out for tensor in tensors(part)]


@pytest.mark.skipif(TORCH < (2, 14), reason="older versions draw other numbers for a truncated normal distribution")
@pytest.mark.parametrize("name", NETS)
def test_initial_weights_equal_version_0_1_0(unpacked, exact, name):
    folder = unpacked("nets") / name
    assert_alike(dict(build(folder).state_dict()), dict(load(folder / "state.pt")), exact)


@pytest.mark.parametrize("name", NETS)
def test_outputs_and_gradients_equal_version_0_1_0(unpacked, exact, name):
    folder = unpacked("nets") / name
    net, expected = build(folder), load(folder / "expected.pt")
    for tensor in net.state_dict().values():
        tensor.zero_()
    net.load_state_dict(load(folder / "state.pt"))
    x = expected["x"].requires_grad_()
    torch.manual_seed(1)  # for dropout
    out = tensors(net(x))
    sum((part * part.detach().cos()).sum() for part in out).backward()
    assert_alike([part.detach() for part in out], expected["out"], exact)
    assert_alike({key: parameter.grad for key, parameter in net.named_parameters()}, expected["grads"], exact)
    assert_alike(x.grad, expected["x_grad"], exact)


# ------------------------------------------------------------------------------------------------------ translation

PREPARE = ("prepare-mt", "table.tsv", "-l", "en-de", "-o", "bin", "--valid", "9", "--test", "11")
PREPARE += ("--merges", "40", "--workers", "1")


@pytest.fixture
def prepared(unpacked) -> Path:
    """Return the directory of a corpus and its prepared data, which record path, size and time of the corpus."""
    folder = unpacked("prepared")
    for note in folder.rglob("prepared.json"):
        content = json.loads(note.read_text().replace("FOLDER", str(folder)))
        content["key"] = hashlib.sha256(json.dumps(content["inputs"], sort_keys=True).encode()).hexdigest()
        note.write_text(json.dumps(content, indent=1) + "\n")
    os.utime(folder / "table.tsv", ns=(1_700_000_000_000_000_000,) * 2)
    return folder


@needs_fairseq
def test_data_prepared_by_version_0_1_0_are_reused(prepared):
    before = {path: path.stat().st_mtime_ns for path in (prepared / "bin").iterdir()}
    assert "already exists" in command(*PREPARE)
    assert {path: path.stat().st_mtime_ns for path in (prepared / "bin").iterdir()} == before


@needs_fairseq
@pytest.mark.parametrize("step", ["tokens", "units"])
def test_resumes_data_preparation_of_version_0_1_0(prepared, monkeypatch, step):
    monkeypatch.setattr(subprocess, "run", forked_programs.run)  # as fairseq-preprocess is started
    (prepared / "bin").rename(prepared / "expected")
    for path in (prepared / f"killed_after_{step}").iterdir():
        path.rename(prepared / path.name)
    for path in prepared.glob("killed_after_*"):
        shutil.rmtree(path)
    with open(prepared / "bin.work" / step / "raw.test.de", "a+") as file:  # lost if the step runs again
        file.seek(0)
        lines = file.read().replace("a", "A")
        file.truncate(0)
        file.write(lines)
    command(*PREPARE)
    assert sorted(os.listdir(prepared)) == ["bin", "expected", "table.tsv"]
    assert (prepared / "bin" / "test.raw.de").read_text() == lines
    for path in (prepared / "expected").iterdir():
        if path.name not in ("prepared.json", "test.raw.de"):
            assert (prepared / "bin" / path.name).read_bytes() == path.read_bytes(), path.name
    notes = [json.loads((prepared / name / "prepared.json").read_text()) for name in ("bin", "expected")]
    assert notes[0] == notes[1]


MODEL = ("--encoder-embed-dim", "8", "--encoder-ffn-embed-dim", "12", "--encoder-attention-heads", "2")
MODEL += ("--decoder-embed-dim", "8", "--decoder-ffn-embed-dim", "12", "--decoder-attention-heads", "2")
MODEL += ("--decoder-layers", "1", "--share-all-embeddings", "--dropout", "0.1")
MODEL += ("--revcol-columns", "2", "--revcol-blocks", "1,1")
TRAIN = ("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--lr", "0.005", "--lr-scheduler", "inverse_sqrt")
TRAIN += ("--warmup-updates", "40", "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1")
TRAIN += ("--max-tokens", "120", "--cpu", "--num-workers", "0", "--disable-validation", "--no-epoch-checkpoints")
TRAIN += ("--max-update", "8", "--no-progress-bar")


def user_dir() -> str:
    return command("user-dir").strip().splitlines()[-1]


@pytest.fixture
def translation(unpacked) -> Path:
    """Return the directory of fairseq checkpoints and their training data."""
    unpacked("prepared")
    return unpacked("translation")


@needs_fairseq
def test_fairseq_resumes_a_checkpoint_of_version_0_1_0(translation, exact):
    where = ("--user-dir", user_dir(), "--save-dir", "saved")
    program("fairseq-train", "bin", *where, "--arch", "revcol_transformer", *MODEL, *TRAIN)
    ours, theirs = (load_fairseq(path) for path in ("saved/checkpoint_last.pt", "expected/final.pt"))
    assert ours["optimizer_history"][-1]["num_updates"] == 8
    for part in ("model", "last_optimizer_state"):
        assert_alike(dict(ours[part]), dict(theirs[part]), exact, **TRAINED, at=part)


@needs_fairseq
def test_fairseq_translates_with_a_checkpoint_of_version_0_1_0(translation, exact):
    """The YAML file of its network no longer exists."""
    path = ("--path", "from_file/checkpoint_last.pt", "--results-path", "generated", "--cpu")
    search = ("--beam", "2", "--max-len-b", "9", "--required-batch-size-multiple", "1")
    program("fairseq-generate", "bin", "--user-dir", user_dir(), *path, *search)
    ours, theirs = (
        re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", (translation / name / "generate-test.txt").read_text(), re.MULTILINE)
        for name in ("generated", "expected")
    )
    assert len(ours) == len(theirs) == 11
    if exact:
        assert ours == theirs
    scores = [{number: float(score) for number, score, _ in lines} for lines in (ours, theirs)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


@needs_fairseq
def test_averages_checkpoints_of_version_0_1_0(translation, exact):
    command("average-checkpoints", "saved", "--updates", "--last", "2", "-o", "average.pt")
    ours, theirs = (load_fairseq(path)["model"] for path in ("average.pt", "expected/average.pt"))
    assert_alike(dict(ours), dict(theirs), exact)


def load_fairseq(path: str) -> dict[str, Any]:
    """Load a fairseq checkpoint. It contains options, so weights_only fails, but the file is trusted."""
    return torch.load(path, map_location="cpu", weights_only=False)
