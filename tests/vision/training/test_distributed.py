"""Two processes over gloo train like one process with accumulation, and recover from the same failures."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from tests.support.errors import raises_error
from tests.support.training_processes import console_output, process, together
from tests.support.training_runs import assert_same, assert_same_run, tiny
from vision.checkpoints import manager, reader
from vision.checkpoints.reshard import reshard
from vision.checkpoints.sharding import SAVE, own_part
from vision.cli.evaluate import evaluate_checkpoint
from vision.training.run_log import LOG, read_log

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

KINDS = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp", "checkpoint": "full"},
    "shards": {"parallel": "fsdp", "checkpoint": "sharded"},
}
SUFFIX = {"ddp": ".pt", "fsdp": ".pt", "shards": ""}


def pair(output, kind, **changes):
    """A run of two processes that does what the tiny run does with two passes an update."""
    return tiny(output, grad_accum=1, **KINDS[kind], **changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Uninterrupted runs: one process, and two of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    assert process(tiny(folder / "one")) == 0
    for kind in KINDS:
        assert together(pair(folder / kind, kind)) == [0, 0], console_output({"output": folder / kind})
    return folder


def final(folder, kind="one"):
    return reader.read(folder / kind / "checkpoints" / f"step-0000010{SUFFIX.get(kind, '.pt')}")


def losses(folder, kind):
    return torch.tensor([line["loss"] for line in read_log(folder / kind / LOG) if line["kind"] == "train"])


@pytest.mark.parametrize("kind", ["ddp", "shards"])
def test_a_nan_loss_in_one_process_stops_both(tmp_path, kind):
    """The fourth update is bad; it follows the checkpoint of the second and comes before that of the fourth."""
    config = pair(tmp_path / "run", kind)
    assert together(config, "images that are no numbers", 4, victim=1) == [3, 3]
    for text in (console_output(config), (tmp_path / "run.1.txt").read_text()):
        assert "error: the loss is nan in epoch 1, step 4." in text
        assert f"The last good state is {tmp_path}/run/checkpoints/step-0000002{SUFFIX[kind]}." in text
    assert os.listdir(tmp_path / "run" / "checkpoints") == [f"step-0000002{SUFFIX[kind]}"]
    state = reader.read(tmp_path / "run" / "checkpoints" / f"step-0000002{SUFFIX[kind]}")
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_like_one_with_accumulation(whole, kind):
    """Mixup, drop path, clipping, averaged weights and validation included; only sums are rounded otherwise."""
    torch.testing.assert_close(losses(whole, kind), losses(whole, "one"), rtol=1e-4, atol=1e-4)
    ours, theirs = final(whole, kind), final(whole)
    for part in ("model", "ema"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=0.01, atol=0.005)
    lines = [[line for line in read_log(whole / name / LOG) if line["kind"] == "eval"] for name in (kind, "one")]
    for line, other in zip(*lines, strict=True):
        assert line["ema_loss"] == pytest.approx(other["ema_loss"], abs=1e-3)
        assert line["ema_top1"] == pytest.approx(other["ema_top1"], abs=1.5)


def test_only_the_first_process_prints_and_saves(whole):
    folder = whole / "ddp"
    assert (whole / "ddp.txt").read_text().count("epoch 1/2") == 1
    assert (whole / "ddp.1.txt").read_text() == ""
    assert sorted(os.listdir(folder)) == ["checkpoints", "config.yaml", "curves.png", "log.jsonl", "tensorboard"]


@pytest.mark.parametrize(
    ("kind", "moment", "count", "victim"),
    [
        ("ddp", "before an update", 4, 0),
        ("ddp", "before an update", 8, 1),
        ("ddp", "while a checkpoint is written", 3, 0),
        ("shards", "before an evaluation", 1, 1),
        ("shards", "while a checkpoint is written", 2, 1),  # one shard is there, the other is not
        ("shards", "before a file gets its name", 7, 0),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path, whole, kind, moment, count, victim):
    config = pair(tmp_path / "run", kind)
    codes = together(config, moment, count, victim=victim)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 3  # one line reports the lost partner
    text = (tmp_path / f"run{'' if victim else '.1'}.txt").read_text()
    assert text.splitlines()[-1].startswith(f"error: process {1 - victim} lost its connection to another")
    assert together(config) == [0, 0], console_output(config)
    assert_same_run(tmp_path / "run", whole / kind, SUFFIX[kind])


@pytest.mark.parametrize(("kind", "number"), [("ddp", signal.SIGTERM), ("shards", signal.SIGINT)])
def test_a_signal_to_one_stops_both(tmp_path, whole, kind, number):
    config = pair(tmp_path / "run", kind, save_every=None, keep=3)
    assert together(config, "before an update", 7, number, victim=1) == [128 + number] * 2
    text = console_output(config)
    assert f"Stopped by {signal.Signals(number).name} in epoch 2, step 7; saved" in text
    assert together({**config, "save_every": 2, "keep": 2}) == [0, 0], console_output(config)
    assert_same_run(tmp_path / "run", whole / kind, SUFFIX[kind])


def test_a_full_disk_of_one_process_stops_both_and_leaves_the_checkpoint_before(tmp_path, whole):
    config = pair(tmp_path / "run", "shards", resume=str(whole / "shards" / "checkpoints" / "step-0000008"))
    assert together(config, limit=1500, victim=1) == [3, 3]
    assert "cannot be written" in console_output(config)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert together(config) == [0, 0], console_output(config)
    ended = reader.read(tmp_path / "run" / "checkpoints" / "step-0000010")
    assert_same(ended["model"], final(whole, "shards")["model"], "model")


def test_shards_and_whole_files_are_converted(tmp_path, whole):
    """Checkpoints of one step written by two processes in shards, and gathered, hold the same; so do conversions."""
    shards, file = whole / "shards" / "checkpoints" / "step-0000010", whole / "fsdp" / "checkpoints" / "step-0000010.pt"
    assert_same(reader.read(shards)["model"], reader.read(file)["model"], "model")
    reshard(shards, tmp_path / "whole.pt", 0)
    reshard(tmp_path / "whole.pt", tmp_path / "again", 2)
    reshard(tmp_path / "again", tmp_path / "three", 3)
    expected = reader.read(shards)
    for path in ("whole.pt", "again", "three"):
        assert_same(reader.read(tmp_path / path), expected, path)
    for name in ("shard-00000-of-00002.pt", "shard-00001-of-00002.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (tmp_path / "again", shards))
        tensors = {key: tensor for key, tensor in theirs.items() if key != SAVE}
        assert tensors.keys() <= ours.keys()
        assert_same({key: ours[key] for key in tensors}, tensors, name)
    with raises_error(manager.CheckpointError, code="file-exists", source=tmp_path / "whole.pt"):
        reshard(shards, tmp_path / "whole.pt", 0)


def test_parts_equal_those_of_fsdp():
    tensor = torch.arange(5)
    assert [own_part(tensor, rank, 4).tolist() for rank in range(4)] == [[0, 1], [2, 3], [4], []]


@pytest.mark.parametrize(
    ("kind", "source"), [("ddp", "shards"), ("shards", "fsdp"), ("fsdp", "converted"), ("one", "shards")]
)
def test_a_run_resumes_with_another_parallelism(tmp_path, whole, kind, source):
    """From the middle of an epoch to its end, with other processes, other wrappers and other checkpoints."""
    if source == "converted":
        reshard(whole / "shards" / "checkpoints" / "step-0000008", tmp_path / "three", 3)
        path = tmp_path / "three"
    else:
        path = whole / source / "checkpoints" / f"step-0000008{SUFFIX[source]}"
    changes = {"resume": str(path)}
    if kind == "one":
        config = tiny(tmp_path / kind, **changes)
        assert process(config) == 0, console_output(config)
    else:
        config = pair(tmp_path / kind, kind, **changes)
        assert together(config) == [0, 0], console_output(config)
    torch.testing.assert_close(final(tmp_path, kind)["model"], final(whole)["model"], rtol=0.01, atol=0.005)
    assert "in epoch 2, step 8" in console_output(config)


def test_float16_in_shards_skips_the_same_updates_as_one_process(tmp_path):
    """The scale begins so high that gradients overflow in some processes, and all processes must skip the update.

    Gradients are clipped element by element, as the recipes for large data do.
    """
    changes = {
        "amp": "float16",
        "epochs": 1,
        "mixup": None,
        "save_every": None,
        "clip_mode": "value",
        "clip_grad": 0.01,
    }
    config = pair(tmp_path / "shards", "shards", **changes)
    assert together(config) == [0, 0], console_output(config)
    one = tiny(tmp_path / "one", **changes)
    assert process(one) == 0
    ours = reader.read(tmp_path / "shards" / "checkpoints" / "step-0000005")
    theirs = reader.read(tmp_path / "one" / "checkpoints" / "step-0000005.pt")
    assert ours["scaler"] == theirs["scaler"]
    torch.testing.assert_close(ours["model"], theirs["model"], rtol=0.02, atol=0.01)


def test_supervised_in_shards(tmp_path, whole):
    """Heads at the columns are divided, saved, evaluated and resumed like everything else; in channels_last."""
    model = {"timm": "test_revcol", "patch_size": 2, "dims": [4, 4, 6, 6], "drop_path_rate": 0.1}
    changes = {
        "model": model,
        "data": {"name": "digits", "img_size": 16},
        "supervision": {"alpha": 1.0},
        "channels_last": True,
        "log_every": 5,
    }
    configs = [pair(tmp_path / name, "shards", epochs=1, **changes) for name in ("whole", "killed")]
    assert together(configs[0]) == [0, 0], console_output(configs[0])
    assert -signal.SIGKILL in together(configs[1], "before an update", 4)
    assert together(configs[1]) == [0, 0], console_output(configs[1])
    states = [reader.read(tmp_path / name / "checkpoints" / "step-0000005") for name in ("whole", "killed")]
    for part in ("model", "heads", "ema", "heads_ema", "optimizer"):
        assert states[0][part]
        assert_same(states[1][part], states[0][part], part)
    line = read_log(tmp_path / "whole" / LOG)[-1]
    found = evaluate_checkpoint(tmp_path / "whole")  # by one process
    for name, metrics in found.items():
        assert set(metrics.heads) == {f"{key}_{column}" for key in ("loss", "top1", "top5") for column in (0, 1, 2)}
        for key, value in metrics.scalars().items():
            assert line[f"{name}_{key}"] == pytest.approx(value, abs=1e-4)
