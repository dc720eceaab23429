"""Learning rates update by update, and the length of a run, against their formulas."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.support.errors import raises_error
from tests.support.training_runs import TINY, assert_same, tiny
from vision.checkpoints import reader
from vision.config.run import load_config, without_unused
from vision.tasks import builders
from vision.training.run_log import LOG, read_log
from vision.training.trainer import Trainer

UPDATES_OF_EPOCH = 7


def rates(schedule, *words, updates=29, **optimizer):
    """The learning rate of each update of a run, of lr 0.5 if nothing else is given."""
    config = load_config({"model": TINY["model"], "output": "x"}, words).plain()
    config = load_config({**config, "schedule": schedule, "optimizer": {"lr": 0.5, **optimizer}})
    built = builders.build_optimizer(config, torch.nn.Linear(2, 2), 64)
    course = builders.build_schedule(config, built, UPDATES_OF_EPOCH, 64)
    seen = []
    for done in range(updates):
        seen.append(built.param_groups[0]["lr"])
        course.step_update(done + 1)
    return seen


def test_poly_after_a_warm_up_in_updates():
    found = rates({"name": "poly", "power": 2.0, "min_lr": 0.1, "warmup_updates": 5, "warmup_lr": 0.05}, "updates=29")
    expected = [0.05 + 0.45 * t / 5 if t < 5 else 0.1 + 0.4 * (1 - t / 29) ** 2 for t in range(29)]
    assert found == pytest.approx(expected)


def test_a_warm_up_from_a_fraction_of_the_rate():
    found = rates({"name": "constant", "warmup_updates": 4, "warmup_ratio": 0.25}, lr_base_size=32)
    assert found[:6] == pytest.approx([0.25, 0.4375, 0.625, 0.8125, 1.0, 1.0])  # twice the images, twice the rate


def test_steps_after_epochs():
    found = rates({"name": "step", "milestones": [1, 3], "decay_rate": 0.5}, "epochs=4", updates=28)
    assert found == pytest.approx([0.5] * 7 + [0.25] * 14 + [0.125] * 7)


def test_steps_after_updates():
    found = rates({"name": "step", "milestones": [11, 23], "warmup_updates": 2, "warmup_lr": 0.0}, "updates=29")
    assert found == pytest.approx([0.0, 0.25] + [0.5] * 9 + [0.05] * 12 + [0.005] * 6)


def test_a_cosine_over_updates():
    half = rates({"name": "cosine", "min_lr": 0.0}, "updates=28", updates=15)[14]
    assert half == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("words", "code", "key"),
    [
        (["epochs=5", "updates=100"], "conflicting-values", "epochs"),
        (["epochs=30", "updates=100"], "conflicting-values", "epochs"),  # 30 is the default
        (["updates=0"], "out-of-range", "updates"),
        (["schedule.warmup_epochs=1", "schedule.warmup_updates=5"], "conflicting-values", "schedule.warmup_updates"),
        (["schedule.warmup_lr=0.1", "schedule.warmup_ratio=0.1"], "conflicting-values", "schedule.warmup_ratio"),
        (["schedule.warmup_epochs=0.0", "schedule.warmup_updates=5"], "conflicting-values", "schedule.warmup_updates"),
        (["schedule.warmup_lr=0.000001", "schedule.warmup_ratio=0.1"], "conflicting-values", "schedule.warmup_ratio"),
        (["schedule.warmup_ratio=2"], "out-of-range", "schedule.warmup_ratio"),
        (["schedule.power=2"], "conflicting-values", "schedule.power"),
        (["schedule.power=1.0"], "conflicting-values", "schedule.power"),
        (["schedule.milestones=[3]"], "conflicting-values", "schedule.milestones"),
        (["schedule.decay_rate=0.5"], "conflicting-values", "schedule.decay_rate"),
        (["schedule.name=step"], "missing-key", "schedule.milestones"),
        (["schedule={name: step, milestones: [3, 3]}"], "out-of-range", "schedule.milestones"),
        (["schedule={name: step, milestones: [0]}"], "out-of-range", "schedule.milestones"),
        (["schedule={name: step, milestones: [30]}"], "conflicting-values", "schedule.milestones"),
        (["schedule={name: step, milestones: [3], min_lr: 0.1}"], "conflicting-values", "schedule.min_lr"),
        (["schedule={name: step, milestones: [3], min_lr: 0.000001}"], "conflicting-values", "schedule.min_lr"),
        (["schedule={name: constant, min_lr: 0.1}"], "conflicting-values", "schedule.min_lr"),
        (["schedule={name: constant, min_lr: 0.000001}"], "conflicting-values", "schedule.min_lr"),
        (["schedule.min_lr=0.1", "optimizer.lr=0.01"], "conflicting-values", "schedule.min_lr"),
        (["schedule.name=poly", "optimizer.lr=0.0000001"], "conflicting-values", "schedule.min_lr"),
        (["updates=9", "schedule.warmup_updates=9"], "conflicting-values", "schedule.warmup_updates"),
        (["updates=9", "schedule={name: step, milestones: [9]}"], "conflicting-values", "schedule.milestones"),
    ],
)
def test_conflicting_keys_are_refused(words, code, key):
    with raises_error(code=code, key=key):
        load_config({"model": TINY["model"], "output": "x"}, words)


def test_a_conflict_names_the_base_file_and_null_resolves_it(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("epochs: 30\nschedule: {name: cosine, warmup_epochs: 0.5, min_lr: 1.0e-6}\n")
    settings = {"base": str(base), "model": TINY["model"], "output": "x"}
    with raises_error(code="conflicting-values", key="epochs", source=base):
        load_config(settings, ["updates=100"])
    config = load_config({**settings, "updates": 100}, ["epochs=null"])
    assert (config.updates, config.schedule.min_lr) == (100, 1e-6)
    with raises_error(code="conflicting-values", key="schedule.min_lr", source=base):
        load_config(settings, ["schedule.name=constant"])
    config = load_config({**settings, "schedule": {"name": "constant", "min_lr": None, "warmup_epochs": None}})
    assert (config.schedule.name, config.schedule.warmup_epochs) == ("constant", 0)


@pytest.mark.parametrize(
    "words", [[], ["updates=9"], ["schedule={name: constant, warmup_updates: 4, warmup_ratio: 0.5}"]]
)
def test_a_saved_configuration_is_accepted_again(words):
    config = load_config({"model": TINY["model"], "output": "x"}, words)
    assert load_config(config.plain()) == config
    assert load_config(without_unused(config.model_dump(mode="json"))) == config  # as earlier versions saved it


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["updates=14", "schedule.warmup_epochs=2"], "schedule.warmup_epochs"),
        (["epochs=2", "schedule.warmup_updates=14"], "schedule.warmup_updates"),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_refused_when_its_epochs_are_known(words, key):
    config = load_config({"model": TINY["model"], "output": "x"}, words)
    optimizer = builders.build_optimizer(config, torch.nn.Linear(2, 2), 64)
    with raises_error(code="conflicting-values", key=key, names="14"):
        builders.build_schedule(config, optimizer, UPDATES_OF_EPOCH, 64)


def values(output, updates):
    """The tiny run, whose epochs have 5 updates, with a length in updates."""
    schedule = {"name": "step", "milestones": [3, 6], "warmup_updates": 2}
    values = copy.deepcopy(tiny(output, updates=updates, schedule=schedule))
    del values["epochs"]
    return values


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("updates") / "run"
    Trainer(load_config(values(output, 8))).fit()
    return output


def test_a_run_ends_after_its_updates_with_an_evaluation(whole):
    lines = read_log(whole / LOG)
    assert [(line["kind"], line["epoch"], line["step"]) for line in lines if line["kind"] == "eval"] == [
        ("eval", 1, 5),
        ("eval", 2, 8),
    ]
    assert load_config(whole / "config.yaml").updates == 8
    assert reader.read(whole / "checkpoints" / "step-0000008.pt")["progress"]["epoch"] == 2


def test_a_longer_run_finishes_an_incomplete_epoch(whole, tmp_path):
    Trainer(load_config(values(tmp_path / "run", 7))).fit()
    Trainer(load_config(values(tmp_path / "run", 8))).fit()
    ours, theirs = (reader.read(folder / "checkpoints" / "step-0000008.pt") for folder in (tmp_path / "run", whole))
    for part in ("model", "ema", "heads", "optimizer"):
        assert_same(ours[part], theirs[part], part)
    evaluated = [(line["epoch"], line["step"]) for line in read_log(tmp_path / "run" / LOG) if line["kind"] == "eval"]
    assert evaluated == [(1, 5), (2, 8)]
