"""Training with several sets of classes: losses, metrics, checkpoints, and heads at earlier columns."""

from __future__ import annotations

import signal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from tests.support.errors import raises_error
from tests.support.labeling import HEADS, run_of, source, train, two_sources
from tests.support.training_processes import process, together
from tests.support.training_runs import assert_same
from tests.vision.cli.test_train_and_eval import call
from vision import load_run
from vision.checkpoints import reader
from vision.config.run import load_config
from vision.distributed.context import World
from vision.supervision.supervised import Outputs
from vision.tasks import create_task
from vision.tasks.multi_target import HeadsCrossEntropy, MultiTargetEvaluator
from vision.training.run_log import LOG, read_log


def test_the_loss_is_the_cross_entropy_of_every_head_that_has_a_label():
    torch.manual_seed(0)
    scores, targets = torch.randn(3, 5, requires_grad=True), torch.zeros(3, 5)
    targets[0, 1], targets[1, 3:] = 1, torch.tensor([0.25, 0.75])
    targets[2, :3] = torch.tensor([0.5, 0.25, 0.25])
    targets[2, 4] = 1
    loss = HeadsCrossEntropy(HEADS)(scores, targets)
    parts = (
        F.cross_entropy(scores[:1, :3], torch.tensor([1])),
        F.cross_entropy(scores[1:2, 3:], targets[1:2, 3:]),
        F.cross_entropy(scores[2:, :3], targets[2:, :3]),
        F.cross_entropy(scores[2:, 3:], torch.tensor([1])),
    )
    assert_close(loss, sum(parts) / 3)
    loss.backward()
    assert torch.equal(scores.grad[0, 3:], torch.zeros(2))
    assert torch.equal(scores.grad[1, :3], torch.zeros(3))


def test_batches_in_halves_have_the_gradient_of_the_whole():
    torch.manual_seed(0)
    scores, targets = torch.randn(4, 5), torch.zeros(4, 5)
    targets[0, 1] = targets[1, 4] = targets[2, 0] = 1
    loss = HeadsCrossEntropy(HEADS)
    halves = [loss(scores[rows], targets[rows]) for rows in (slice(0, 2), slice(2, 4))]
    assert_close(sum(halves) / 2, loss(scores, targets))


def test_metrics_count_the_images_of_each_head():
    evaluator = MultiTargetEvaluator(HEADS, torch.device("cpu"))
    scores = torch.tensor([[9.0, 0, 0, 9, 0], [0, 9, 0, 9, 0], [9, 0, 0, 9, 0], [9, 0, 0, 0, 9]])
    classes = torch.tensor([[0, -1], [2, -1], [-1, 0], [-1, -1]])
    evaluator.update(Outputs({1: scores.roll(1, 1), 2: scores}, {}), (torch.zeros(4, 1), classes))
    found = evaluator.compute(World()).scalars()
    assert (found["top1"], found["top1_eyes"], found["top1_1"]) == (50.0, 100.0, 50.0)
    assert set(found) == {f"{key}{place}" for key in ("loss", "top1", "top5") for place in ("", "_eyes", "_1")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    sources = two_sources(folder)
    assert process(run_of(folder / "run", *sources)) == 0
    return folder / "run", sources


def test_a_killed_run_is_resumed_bit_for_bit(tmp_path, whole):
    output, sources = whole
    config = run_of(tmp_path / "run", *sources, save_every=1)
    assert process(config, "before an update", 4) == -signal.SIGKILL
    assert process(config) == 0
    ours, theirs = (reader.read(folder / "checkpoints/step-0000004.pt") for folder in (tmp_path / "run", output))
    for part in ("model", "ema", "optimizer", "progress", "classes"):
        assert_same(ours[part], theirs[part], part)


def test_a_model_learns_both_sets_of_classes(tmp_path):
    config = run_of(tmp_path / "run", *two_sources(tmp_path), epochs=12, grad_accum=1, ema=None, label_smoothing=0.0)
    train(config | {"optimizer": {"name": "adamw", "lr": 0.05}})
    last = read_log(tmp_path / "run" / LOG)[-1]
    assert last["raw_top1"] > 80
    assert last["raw_top1_eyes"] == 100
    assert last["raw_loss_eyes"] < 0.3


def test_eval_shows_every_head(whole):
    code, out, _ = call("eval", whole[0])
    assert code == 0
    assert "best.pt, 13 images" in out
    assert "ema, head eyes" in out
    with raises_error(code="invalid-value", key="--subset"):
        call("eval", whole[0], "--subset")


def test_the_classes_of_a_run_are_named_by_their_heads(whole):
    run = load_run(whole[0])
    assert run.classes == ("insects/ant", "insects/bee", "insects/cat", "eyes/ant", "eyes/bee")
    assert run.model(torch.zeros(1, 3, 16, 16)).shape == (1, 5)


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_and_count_as_one(tmp_path, whole):
    output, sources = whole
    assert together(run_of(tmp_path / "run", *sources, grad_accum=1)) == [0, 0]
    ours, theirs = (reader.read(folder / "checkpoints/step-0000004.pt") for folder in (tmp_path / "run", output))
    assert_close(ours["model"], theirs["model"], atol=1e-4, rtol=1e-4)
    mine, other = (read_log(folder / LOG)[-1] for folder in (tmp_path / "run", output))
    assert [line.pop("kind") for line in (mine, other)] == ["eval", "eval"]
    assert mine == pytest.approx(other, rel=1e-3)


def test_a_run_does_not_resume_with_other_heads(whole):
    output, sources = whole
    config = run_of(output, *sources, epochs=3)
    with raises_error(code="settings-differ", key="data.1.input_key"):
        train(config | {"data": [sources[0], sources[1] | {"input_key": ".jpg"}]})


def test_heads_at_earlier_columns_have_losses_of_all_heads(tmp_path):
    model = {"timm": "test_revcol", "num_classes": 5}
    changes = {"model": model, "supervision": {"heads": 2}, "epochs": 1, "ema": None, "batch_size": 4}
    sources = [one | {"img_size": 32} for one in two_sources(tmp_path)]
    config = load_config(run_of(tmp_path / "run", *sources, **changes))
    task = create_task(config)
    data = task.load_data()
    torch.manual_seed(0)
    training_task = task.training_task(task.build_model(data), data, torch.device("cpu"))
    images, targets = torch.randn(3, 3, 32, 32), torch.zeros(3, 5)
    targets[0, 1] = targets[1, 4] = 1
    found = task.forward(training_task, (images, targets))
    outputs = training_task.supervised()(images)
    for column, scores in outputs.logits.items():
        halves = F.cross_entropy(scores[:1, :3], torch.tensor([1])), F.cross_entropy(scores[1:2, 3:], torch.tensor([1]))
        assert_close(found[f"ce_{column}"], sum(halves) / 3)
    assert len(outputs.logits) == 2
    train(run_of(tmp_path / "run", *sources, **changes))
    last = read_log(tmp_path / "run" / LOG)[-1]
    assert {"raw_top1", "raw_top1_eyes"} < set(last)
    assert len([key for key in last if key.startswith("raw_top1_")]) == 2


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"data": []}, "wrong-length", "data"),
        ({"heads": None}, "missing-key", "data.0.head"),
        ({"heads": {"insects": 3}}, "unknown-choice", "data.1.head"),
        ({"heads": {"insects": 1, "eyes": 2}}, "out-of-range", "heads.insects"),
        ({"data": {"name": "digits"}}, "conflicting-values", "heads"),
        ({"mixup": {"mixup_alpha": 0.8}}, "reserved-key", "mixup"),
    ],
)
def test_wrong_settings_are_named(tmp_path, changes, code, key):
    with raises_error(code=code, key=key):
        create_task(load_config(run_of(tmp_path / "run", *two_sources(tmp_path), **changes)))


@pytest.mark.parametrize(
    ("first", "second", "code", "key"),
    [
        ({}, {"img_size": 32}, "conflicting-values", "data.1.img_size"),
        ({"weight": 1.0}, {}, "missing-key", "data.1.weight"),
        ({"name": "digits"}, {}, "conflicting-values", "data.0.name"),
        ({}, {"head": None}, "missing-key", "data.1.head"),
        ({}, {"rot": 1}, "unknown-key", "data.1.rot"),
        ({}, {"name": "wds"}, "conflicting-values", "data.1.name"),
        ({}, {"weight": 0.0}, "out-of-range", "data.1.weight"),
    ],
)
def test_wrong_settings_of_sources_are_named(tmp_path, first, second, code, key):
    sources = [one | changes for one, changes in zip(two_sources(tmp_path), (first, second), strict=True)]
    with raises_error(code=code, key=key):
        load_config(run_of(tmp_path / "run", *sources))


@pytest.mark.parametrize(
    ("heads", "is_list", "code", "key"),
    [
        (None, False, "missing-key", "data.weight"),
        ({"insects": 3}, False, "conflicting-values", "data.weight"),
        ({"insects": 3}, True, "conflicting-values", "data.0.weight"),
    ],
)
def test_a_weight_of_a_single_source_is_refused(tmp_path, heads, is_list, code, key):
    entry = source(tmp_path, weight=2.0, head=None if heads is None else "insects")
    config = {**run_of(tmp_path / "run"), "heads": heads, "data": [entry] if is_list else entry}
    with raises_error(code=code, key=key):
        load_config(config)
