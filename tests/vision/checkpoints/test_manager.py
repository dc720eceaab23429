"""Checkpoints are complete, safe to load and of the same model, or a one-line error reports the reason."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.errors import raises_error
from vision.checkpoints import manager, reader
from vision.checkpoints.layout import KEYS
from vision.checkpoints.manager import CheckpointError, Checkpoints
from vision.checkpoints.reshard import reshard


def state(step: int, **changes):
    empty = dict.fromkeys(KEYS)
    return {**empty, "format": manager.FORMAT, "progress": {"step": step}, "model": torch.randn(5), **changes}


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_latest_and_the_best_checkpoint_are_kept(tmp_path):
    run = Checkpoints(tmp_path, keep=2)
    states = [state(step) for step in (9, 10, 11, 100)]
    for index, item in enumerate(states):
        run.save(item, best=index == 1)
    assert [manager.step_of(path) for path in run.all()] == [11, 100]
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step-0000011.pt", "step-0000100.pt"]
    assert torch.equal(reader.read(run.best)["model"], states[1]["model"])
    assert torch.equal(reader.read(run.all()[-1])["model"], states[3]["model"])


@pytest.mark.parametrize("part", [0.0, 0.3, 0.99, 0.9999])
def test_a_truncated_file(tmp_path, part):
    path = Checkpoints(tmp_path, keep=1).save(state(1, model=torch.randn(10_000)))
    os.truncate(path, int(path.stat().st_size * part))
    with raises_error(CheckpointError, code="damaged-file", source=path):
        reader.read(path)


def test_nothing_in_a_file_is_executed(tmp_path):
    trap = tmp_path / "trap"
    torch.save(state(1, config=Evil(trap)), tmp_path / "evil.pt")
    with raises_error(CheckpointError, code="unsafe-file", source=tmp_path / "evil.pt", names="plain data"):
        reader.read(tmp_path / "evil.pt")
    assert not trap.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert trap.exists()  # it would have been


def test_shards_that_are_missing_foreign_or_malicious(tmp_path):
    step = Checkpoints(tmp_path / "run", keep=1).save(state(1, model={"weight": torch.randn(5, 2)}))

    def shards(name: str) -> Path:
        reshard(step, tmp_path / name, 2)
        assert torch.equal(reader.read(tmp_path / name)["model"]["weight"], reader.read(step)["model"]["weight"])
        return tmp_path / name

    (missing := shards("missing")).joinpath("shard-00001-of-00002.pt").unlink()
    os.truncate((cut := shards("cut")) / "shard-00001-of-00002.pt", 500)
    torch.save({"other": torch.zeros(1)}, (foreign := shards("foreign")) / "shard-00001-of-00002.pt")
    (bare := shards("bare")).joinpath("state.pt").unlink()
    trap = tmp_path / "trap"
    torch.save({"/model/weight": Evil(trap)}, (evil := shards("evil")) / "shard-00001-of-00002.pt")
    for path, code, source in (
        (missing, "missing-file", missing / "shard-00001-of-00002.pt"),
        (cut, "damaged-file", cut / "shard-00001-of-00002.pt"),
        (foreign, "damaged-file", foreign),
        (bare, "missing-file", bare),
        (evil, "unsafe-file", evil / "shard-00001-of-00002.pt"),
    ):
        with raises_error(CheckpointError, code=code, source=source):
            reader.read(path)
    assert not trap.exists()


def resharded(folder: Path, *steps: int) -> list[Path]:
    """Checkpoints in two shards, whose tensors have equal shapes."""
    for step in steps:
        model = {"weight": torch.full((4, 2), float(step))}
        whole = Checkpoints(folder / "runs" / str(step), keep=1).save(state(step, model=model))
        reshard(whole, folder / str(step), 2)
    return [folder / str(step) for step in steps]


@pytest.mark.parametrize("source", ["7/shard-00001-of-00002.pt", "3/shard-00000-of-00002.pt"])
def test_a_shard_of_equal_shapes_from_another_save_or_place(tmp_path, source):
    folder, _ = resharded(tmp_path, 3, 7)
    shard = folder / "shard-00001-of-00002.pt"
    shutil.copyfile(tmp_path / source, shard)
    with raises_error(CheckpointError, code="damaged-file", source=folder, names=shard.name):
        reader.read(folder)


def test_shards_of_versions_without_ids(tmp_path):
    """All files lack the id: they are read. A shard without one next to a state with one is not."""
    folder, other = resharded(tmp_path, 3, 7)
    expected = reader.read(folder)["model"]
    for path in (*folder.iterdir(), other / "shard-00000-of-00002.pt"):
        content = torch.load(path, weights_only=True)
        assert content.pop("save")
        torch.save(content, path)
    torch.testing.assert_close(reader.read(folder)["model"], expected, rtol=0, atol=0)
    with raises_error(CheckpointError, code="damaged-file", source=other, names="shard-00000-of-00002.pt"):
        reader.read(other)


@pytest.mark.parametrize(
    ("content", "code", "names"),
    [
        ({"weights": torch.zeros(3)}, "wrong-format", "format, versions"),
        (torch.zeros(3), "wrong-format", "format, versions"),
        (state(1, format=99), "version-mismatch", "99"),
    ],
)
def test_files_of_other_kinds(tmp_path, content, code, names):
    torch.save(content, tmp_path / "x.pt")
    with raises_error(CheckpointError, code=code, source=tmp_path / "x.pt", names=names):
        reader.read(tmp_path / "x.pt")


def test_paths_that_are_not_files(tmp_path):
    (tmp_path / "text.pt").write_text("columns: 4\n")
    for path, code in (
        (tmp_path / "no.pt", "missing-file"),
        (tmp_path, "missing-file"),
        (tmp_path / "text.pt", "wrong-format"),
    ):
        with raises_error(CheckpointError, code=code, source=path):
            reader.read(path)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    run = Checkpoints(tmp_path, keep=2)
    before = state(1)
    run.save(before, best=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, hard))
    try:
        expected = ["File too large", "step-0000001.pt is intact"]
        with raises_error(CheckpointError, code="unwritable-file", source=tmp_path / "step-0000002.pt", names=expected):
            run.save(state(2, model=torch.randn(1 << 20)), best=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "step-0000001.pt"]
    assert torch.equal(reader.read(run.best)["model"], before["model"])


def test_a_file_of_a_killed_process_is_removed(tmp_path):
    (tmp_path / ".step-0000001.pt.77.partial").write_bytes(b"half")
    Checkpoints(tmp_path, keep=1).save(state(2))
    assert os.listdir(tmp_path) == ["step-0000002.pt"]


def test_weights_of_another_model_change_nothing():
    model = nn.Linear(3, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    extra = nn.ModuleDict({"extra": nn.Linear(1, 1)})
    extra.register_parameter("weight", nn.Parameter(torch.zeros(5, 3)))
    extra.register_parameter("bias", nn.Parameter(torch.zeros(5)))
    for other, names in (
        (nn.Linear(3, 5, bias=False), "no bias"),
        (nn.Linear(2, 5), ["weight", "(5, 2)", "(5, 3)"]),
        (extra, "extra extra"),
    ):
        with raises_error(CheckpointError, code="weights-mismatch", source="x.pt", names=names):
            reader.load_weights(model, other.state_dict(), Path("x.pt"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
