"""Tasks that are no classification train with the trainer as it is: regression, and a detector of its own."""

from __future__ import annotations

import io
import math
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from typer.testing import CliRunner

from revnets import SpecError
from tests.support.errors import raises_error
from tests.support.image_tasks import Brightness
from tests.support.training_processes import console_output, process, together
from tests.support.training_runs import TINY, assert_same, assert_same_run, tiny
from tests.vision.cli.test_train_and_eval import app
from vision.checkpoints import reader
from vision.config.run import load_config
from vision.tasks import create_task
from vision.training.run_log import LOG, read_log
from vision.training.trainer import Trainer

BRIGHTNESS = "tests.support.image_tasks:Brightness"
SPOTS = {"type": "tests.support.image_tasks:SpotDetection", "length": 240}


def brightness(output: Path, **changes: Any) -> dict[str, Any]:
    """The tiny run with another task: drop path, accumulation and averaged weights stay."""
    model = {**TINY["model"], "head": {"type": "classifier", "num_classes": 1}}
    own = {"task": BRIGHTNESS, "model": model, "label_smoothing": 0.0, "mixup": None}
    return tiny(output, **{**own, **changes})


def spots(output: Path, **changes: Any) -> dict[str, Any]:
    own = {"task": SPOTS, "label_smoothing": 0.0, "mixup": None, "ema": None, "batch_size": 6, "log_every": 20}
    return tiny(output, **{**own, **changes})


def trained(config: Mapping[str, Any]) -> tuple[Trainer, Any, str]:
    console = Console(file=io.StringIO(), width=200)
    trainer = Trainer(load_config(config), console)
    outcome = trainer.fit()
    return trainer, outcome, console.file.getvalue()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of the regression that nothing interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert process(brightness(output)) == 0, console_output({"output": output})
    return output


@pytest.mark.parametrize(("moment", "count"), [("before an update", 4), ("before the best gets its name", 1)])
def test_regression_is_killed_and_resumed_bit_for_bit(tmp_path, whole, moment, count):
    config = brightness(tmp_path / "run")
    assert process(config, moment, count) == -signal.SIGKILL
    assert process(config) == 0
    assert_same_run(tmp_path / "run", whole)


def test_the_best_checkpoint_has_the_smallest_error(tmp_path):
    """Three epochs that learn, and one whose learning rate spoils the weights: the highest error is the last one."""
    settings = {"schedule": {"name": "constant"}, "ema": None, "keep": 1}
    trained(brightness(tmp_path, epochs=3, **settings, optimizer={"name": "adamw", "lr": 0.001}))
    _, outcome, _ = trained(brightness(tmp_path, epochs=4, **settings, optimizer={"name": "adamw", "lr": 1.0}))
    errors = {line["step"]: line["raw_mae"] for line in read_log(tmp_path / LOG) if line["kind"] == "eval"}
    best = min(errors, key=errors.__getitem__)
    assert best < 20 == max(errors, key=errors.__getitem__)
    assert outcome.score == errors[best]
    progress = reader.read(outcome.best)["progress"]
    assert (progress["step"], progress["best_step"], progress["best"]) == (best, best, errors[best])
    assert reader.read(outcome.last)["progress"]["best_step"] == best


def test_log_lines_and_figure_have_the_metrics_of_the_task(whole):
    lines = read_log(whole / LOG)
    evals = [line for line in lines if line["kind"] == "eval"]
    names = [f"{weights}_{metric}" for weights in ("raw", "ema") for metric in ("mae", "median", "count")]
    assert [list(line) for line in evals] == [["kind", "epoch", "step", *names]] * 2
    assert all(line["raw_count"] == 359 for line in evals)
    assert list(lines[0]) == ["kind", "epoch", "step", "loss", "lr", "images_per_second"]
    shown = console_output({"output": whole})
    for line in evals:
        values = f"error raw {line['raw_mae']:.3f} levels  ema {line['ema_mae']:.3f} levels"
        assert re.search(rf"epoch {line['epoch']}/2  loss \d+\.\d{{4}}  {values}  ", shown)
    assert (whole / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "classes" not in reader.read(whole / "checkpoints" / "best.pt")


def test_commands_train_and_evaluate_it(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(brightness(tmp_path / "run", epochs=1)))
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert result.exit_code == 0, result.output
    line = read_log(tmp_path / "run" / LOG)[-1]
    assert f"best error {line['ema_mae']:.3f} levels, " in result.stdout
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--trust"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    for name in ("raw", "ema"):
        values = [f"{line[f'{name}_{metric}']:.4f}" for metric in ("mae", "median", "count")]
        assert re.search(rf"{name} .*{'.*'.join(map(re.escape, values))}", result.stdout)
    for words, key in ((["--subset"], "--subset"), (["--png", str(tmp_path / "x.png")], "--png")):
        result = CliRunner().invoke(app, ["eval", str(tmp_path / "run"), "--trust", *words])
        assert isinstance(result.exception, SpecError)
        assert result.exception.key == key


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_evaluate_every_image_once(tmp_path, whole, parallel):
    """One of their samples is padding; the median is that of one process, which has all images."""
    config = brightness(tmp_path / "run", grad_accum=1, parallel=parallel)
    assert together(config) == [0, 0], console_output(config)
    ours, theirs = (
        [line for line in read_log(path / LOG) if line["kind"] == "eval"] for path in (tmp_path / "run", whole)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["raw_count"] == 359
        for key in ("ema_mae", "ema_median"):
            assert mine[key] == pytest.approx(other[key], rel=1e-2)


def test_a_detector_trains_with_its_own_data_batches_and_losses(tmp_path):
    """Images of several sizes in lists, losses by name, another name for samples; killed and resumed bit for bit."""
    whole = spots(tmp_path / "whole", epochs=4, save_every=7)
    killed = spots(tmp_path / "killed", epochs=4, save_every=7, workers=1)
    assert process(whole) == 0, console_output(whole)
    lines = read_log(tmp_path / "whole" / LOG)
    assert "scenes_per_second" in lines[0]
    found = [line["raw_found"] for line in lines if line["kind"] == "eval"]
    assert max(found) > max(0.3, found[0])
    assert process(killed, "before an update", 30) == -signal.SIGKILL
    assert process(killed) == 0
    ours, theirs = (reader.read(tmp_path / name / "checkpoints" / "step-0000080.pt") for name in ("killed", "whole"))
    for part in ("model", "optimizer", "progress"):
        assert_same(ours[part], theirs[part], part)
    assert theirs["progress"]["best"] == max(found)


def test_losses_of_a_detector_are_summed(tmp_path):
    trainer = Trainer(load_config(spots(tmp_path)), Console(quiet=True))
    losses = trainer.task.forward(trainer.state.training_task.train(), next(trainer.batches.epoch(0)))
    assert torch.equal(losses["loss"], losses["loss_y"] + losses["loss_x"])


def test_a_run_is_not_continued_as_another_task(tmp_path):
    trained(brightness(tmp_path, epochs=1))
    with raises_error(code="settings-differ", key="task", names=["5.0", BRIGHTNESS]):
        trained(brightness(tmp_path, task={"type": BRIGHTNESS, "scale": 5.0}))


def test_options_reach_the_task_and_survive_plain_data():
    config = load_config(brightness(Path("x"), task={"type": BRIGHTNESS, "scale": 3.0}), ["task.scale=4.0"])
    assert load_config(config.plain()) == config
    task = create_task(config)
    assert isinstance(task, Brightness)
    assert task.scale == 4.0
    assert create_task(load_config(brightness(Path("x")))).scale == 10.0


@pytest.mark.parametrize(
    ("changes", "key", "code", "names"),
    [
        ({"task": "clasification"}, "task", "invalid-value", ["clasification", "classification"]),
        ({"task": 3}, "task", "invalid-value", ["package.module:Class"]),
        ({"task": {"scale": 3}}, "task", "invalid-value", ["package.module:Class"]),
        ({"task": "tests.support.image_task:Brightness"}, "task", "missing-module", ["tests.support.image_task"]),
        ({"task": "tests.support.image_tasks:Bright"}, "task", "unknown-component", ["Bright", "Brightness"]),
        ({"task": "tests.support.image_tasks:Errors"}, "task", "invalid-component", ["Errors", "vision.tasks.Task"]),
        ({"task": {"type": BRIGHTNESS, "scael": 3.0}}, "task.scael", "unknown-key", ["scale"]),
        ({"task": {"type": "classification", "scale": 3.0}}, "task.scale", "unknown-key", []),
        ({"task": {"type": SPOTS["type"]}}, "task.length", "missing-key", []),
        ({"mixup": {"mixup_alpha": 0.5}}, "mixup", "reserved-key", []),
        ({"label_smoothing": 0.1}, "label_smoothing", "reserved-key", []),
        ({"pretrained": {"source": "revcol_tiny"}}, "pretrained", "reserved-key", []),
        ({"supervision": {"heads": 2}, "model": {"timm": "test_revcol"}}, "supervision", "reserved-key", []),
    ],
)
def test_errors_are_one_line_with_the_key(changes, key, code, names):
    with raises_error(code=code, key=key, names=names):
        create_task(load_config(brightness(Path("x"), **changes)))


def test_a_metric_that_the_evaluator_does_not_return(tmp_path, monkeypatch):
    monkeypatch.setattr(Brightness, "monitor", "rmse")
    with raises_error(code="unknown-choice", key="task", names=["rmse", "mae"]):
        trained(brightness(tmp_path, epochs=1))


def test_a_nan_metric_is_never_the_best(tmp_path, monkeypatch):
    scores = iter([math.nan, 3.0, math.nan])
    monkeypatch.setattr(Brightness, "score", lambda *_: next(scores))
    _, outcome, _ = trained(brightness(tmp_path, epochs=3))
    assert outcome.score == 3.0
    assert reader.read(outcome.best)["progress"]["step"] == 10
