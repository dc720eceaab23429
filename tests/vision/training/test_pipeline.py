"""A run over the stages of a pipeline has the weights, the state and the log of one process, bit for bit."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_iter

from tests.support import forked_programs
from tests.support.errors import raises_error
from tests.support.training_processes import console_output, process, together
from tests.support.training_runs import assert_same_run, tiny
from vision.config.run import load_config
from vision.distributed.context import PipelineWorld
from vision.tasks.builders import create_task
from vision.training.pipeline import TopLevelHead, own_state, require_possible
from vision.training.train_state import TrainState

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
PIPELINE = {"parallel": "pipeline", "device": "cpu"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node", "2"]
REVNETS = [sys.executable, "-c", "from revnets.cli.main import main; main()"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert process(tiny(folder / "one")) == 0
    return folder / "one"


@gloo
def test_torchrun_with_two_stages_trains_as_one_process(tmp_path, whole):
    """Mixup, drop path, clipping, averaged weights, evaluation, checkpoints and the log included."""
    settings = tiny(tmp_path / "run", **PIPELINE)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [*TORCHRUN, *REVNETS, "train", tmp_path / "run.yaml"]
    result = forked_programs.run(words, env=environment, forks=True)
    assert result.returncode == 0, result.stderr
    assert_same_run(tmp_path / "run", whole)


@gloo
def test_a_killed_pipeline_resumes_in_one_process(tmp_path, whole):
    config = tiny(tmp_path / "run", **PIPELINE)
    assert together(config, "before an update", 7, victim=1) == [3, -signal.SIGKILL]
    assert console_output(config).splitlines()[-1].startswith("error: process 0 lost its connection to another")
    assert process(config) == 0, console_output(config)
    assert "in epoch 2, step 6" in console_output(config)
    assert_same_run(tmp_path / "run", whole)


@gloo
def test_a_single_process_run_resumes_as_a_pipeline(tmp_path, whole):
    changes = {"pipeline": {"schedule": "gpipe", "balance": "cells"}, "memory": "recompute"}
    path = whole / "checkpoints" / "step-0000008.pt"
    config = tiny(tmp_path / "run", **PIPELINE, **changes, resume=str(path))
    assert together(config) == [0, 0], console_output(config)
    last = [torch.load(folder / "checkpoints" / "step-0000010.pt") for folder in (tmp_path / "run", whole)]
    for part in ("model", "ema", "optimizer"):
        torch.testing.assert_close(last[0][part], last[1][part], rtol=0, atol=0)


@gloo
def test_a_loss_that_is_nan_stops_all_stages(tmp_path):
    config = tiny(tmp_path / "run", **PIPELINE, epochs=1, ema=None)
    assert together(config, "images that are no numbers", 1) == [3, 3]
    for name in ("run.txt", "run.1.txt"):
        assert "error: the loss is nan in epoch 1, step 1." in (tmp_path / name).read_text()


def test_stages_of_a_timm_model_return_its_scores():
    model = timm.create_model("test_revcol", num_classes=7, in_chans=1).eval()
    parts = model.columns.split(3, stem=model.stem, head=TopLevelHead(model.head))
    x = found = torch.randn(2, 1, 64, 64)
    for part in parts:
        found = part(*(found if isinstance(found, tuple) else (found,)))
    assert torch.equal(found, model(x))


def test_the_state_of_a_stage_is_on_the_cpu():
    """Fake tensors of a GPU, which need none; lists of tensors as in the optimizer Kron."""
    with FakeTensorMode():
        weights = {name: torch.empty(3, device=name) for name in ("cuda", "meta")}
        optimizer = torch.optim.SGD([nn.Parameter(weight) for weight in weights.values()])
        entries = {0: {"step": 5, "Q": [torch.empty(2, device="cuda")]}, 1: {}}
        own = own_state({"model": weights, "ema": weights, "optimizer": {"state": entries}}, optimizer)
    assert own["optimizer"].keys() == {0}
    assert own["optimizer"][0]["step"] == 5
    assert {str(tensor.device) for tensor in tree_iter(own) if isinstance(tensor, torch.Tensor)} == {"cpu"}
    assert own["model"].keys() == own["ema"].keys() == {"cuda"}


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"memory": {"budget": "1GiB"}}, "conflicting-values", "memory"),
        ({"amp": "float16"}, "conflicting-values", "amp"),
        ({"checkpoint": "sharded"}, "conflicting-values", "checkpoint"),
        ({"task": "tests.support.image_tasks:Brightness"}, "conflicting-values", "task"),
        ({"model": {"timm": "revcol_tiny"}, "supervision": {}}, "conflicting-values", "supervision"),
        ({"data": {"name": "wds/images", "root": "."}}, "conflicting-values", "data"),
        ({"parallel": "ddp", "pipeline": {}}, "conflicting-values", "pipeline"),
        ({"pipeline": {"schedule": "zero-bubble"}}, "unknown-choice", "pipeline.schedule"),
    ],
)
def test_settings_that_a_pipeline_does_not_support(changes, code, key):
    with raises_error(code=code, key=key):
        load_config(tiny(Path("unused"), **{**PIPELINE, **changes}))


@pytest.mark.parametrize("name", ["lambc", "clambw", "LambCD", "fusedlamb", "kron", "kronw"])
def test_optimizers_that_need_all_parameters_are_refused(name):
    options = {"deterministic": True} if name.startswith("kron") else {}
    config = load_config(tiny(Path("unused"), **PIPELINE, optimizer={"name": name, "options": options}))
    with raises_error(code="conflicting-values", key="optimizer.name"):
        require_possible(config, PipelineWorld(0, 2))


@pytest.mark.parametrize(
    ("changes", "size", "code", "key"),
    [
        ({"grad_accum": 1}, 2, "out-of-range", "grad_accum"),
        ({"grad_accum": 9}, 7, "out-of-range", "parallel"),
        ({"memory": "invert"}, 2, "conflicting-values", "memory"),
        ({"optimizer": {"name": "lamb"}}, 2, "conflicting-values", "optimizer.name"),
        ({"model": {"timm": "resnet10t"}, "data": {"name": "digits", "img_size": 32}}, 2, "no-columns", "parallel"),
        ({"model": {**tiny(Path())["model"], "memory": {"budget": "1GiB"}}}, 2, "conflicting-values", "memory"),
    ],
)
def test_too_many_processes_are_refused(changes, size, code, key):
    config = load_config(tiny(Path("unused"), **{**PIPELINE, "ema": None, **changes}))
    task = create_task(config)
    with raises_error(code=code, key=key):
        TrainState(config, task.load_data(), 1, PipelineWorld(0, size), task)
