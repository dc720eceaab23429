"""Checkpoint entries of the wrong kind are named before they are used."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.errors import raises_error
from tests.support.training_runs import tiny
from vision.checkpoints.layout import TO_EVALUATE, TO_RESUME, require_layout, require_optimizer
from vision.config.run import load_config
from vision.errors import CheckpointError
from vision.training.loaded_run import load_checkpoint

PATH = "run/step.pt"


def checkpoint(**changes) -> dict:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    progress = {"epoch": 1, "step": 2, "best": 0.5, "best_step": 1, "losses": torch.ones(2)}
    state = {"format": 2, "versions": {"torch": "2"}, "config": load_config(tiny("run")).plain(), "world": 1}
    weights = {"model": model.state_dict(), "ema": None, "heads": {}, "heads_ema": {}}
    return {**state, **weights, "progress": progress, "optimizer": optimizer.state_dict(), "scaler": {}, **changes}


@pytest.mark.parametrize("value", [[1], "text", 2**70, torch.zeros(2, 2), {"step": [1]}, {1: 2}])
@pytest.mark.parametrize("key", TO_RESUME)
def test_an_entry_of_another_kind(key, value):
    state = checkpoint()
    require_layout(state, PATH, TO_RESUME)
    *parents, last = key.split(".")
    parent = state
    for name in parents:
        parent = parent[name]
    parent[last] = value
    if key == "config.optimizer" and isinstance(value, dict):  # compared with that of the run
        return
    if key == "model" and isinstance(value, torch.Tensor):  # refused where its names are needed
        return
    with raises_error(CheckpointError, code="wrong-format", source=PATH, names=key.split(".")[0]):
        require_layout(state, PATH, TO_RESUME)


@pytest.mark.parametrize(
    ("key", "value"), [("category_ids", [3, "7"]), ("category_ids", [True]), ("classes", ["a", 7])]
)
def test_a_list_with_an_item_of_another_kind(key, value):
    with raises_error(CheckpointError, code="wrong-format", source=PATH, names=key):
        require_layout(checkpoint(**{key: value}), PATH, TO_EVALUATE)


@pytest.mark.parametrize("key", TO_EVALUATE)
def test_an_entry_that_is_missing(key):
    with raises_error(CheckpointError, code="wrong-format", source=PATH, names=key):
        require_layout(checkpoint(**{key: None}), PATH, TO_EVALUATE)


def test_impossible_progress():
    state = checkpoint()
    state["progress"]["epoch"] = 3
    with raises_error(CheckpointError, code="wrong-format", source=PATH, names="progress.step"):
        require_layout(state, PATH, TO_RESUME)


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["state"][0].pop("exp_avg"),
        lambda saved: saved["state"][0].update(exp_avg=torch.zeros(7)),
        lambda saved: saved["state"][0].update(exp_avg=[1.0]),
        lambda saved: saved["state"].update({9: {}}),
        lambda saved: saved["param_groups"][0].update(lr="fast"),
        lambda saved: saved["param_groups"][0].update(lr=float("nan")),
        lambda saved: saved["param_groups"][0].update(betas=(1.0, 1.0)),
        lambda saved: saved["param_groups"][0].update(params=[0, 0]),
        lambda saved: saved["param_groups"].append({"params": []}),
    ],
)
def test_the_state_of_another_optimizer(change):
    own, saved = torch.optim.AdamW(nn.Linear(2, 3).parameters()), copy.deepcopy(checkpoint()["optimizer"])
    require_optimizer(saved, own, PATH)
    change(saved)
    with pytest.raises(CheckpointError, match=PATH):
        require_optimizer(saved, own, PATH)


@pytest.mark.parametrize("change", [{"dim": 40_000}, {"depth": 1_000}])
def test_a_configuration_of_a_much_larger_model(tmp_path, change):
    """Its model would have 10^11 numbers, or 6,000 blocks."""
    state = checkpoint(classes=[str(digit) for digit in range(10)])
    for level in state["config"]["model"]["levels"]:
        level.update(change)
    torch.save(state, tmp_path / "a.pt")
    with raises_error(CheckpointError, code="weights-mismatch", source=tmp_path / "a.pt", names="configuration"):
        load_checkpoint(tmp_path / "a.pt")
