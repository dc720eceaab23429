"""Memory of a whole training step, heads included: predicted from a recipe, and measured."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import revnets
from revnets import ReversibleColumns
from revnets.memory.tracker import peak_bytes
from tests.support.errors import raises_error
from vision.paths import FOLDERS
from vision.tasks import recipe_steps

RECIPE = "ade20k_upernet_revcol_tiny"
SMALL = {
    "model": {"timm": "test_revcol"},
    "task": {"options": {"channels": 24, "auxiliary_channels": 12}},
    "data": {"img_size": 97, "num_classes": 7, "window": None, "stride": None},
}


@pytest.mark.parametrize(
    ("memory", "checkpoint_heads"),
    [("store", False), ("recompute", False), ("invert", False), ("exact", False), ("exact", True)],
)
def test_the_peak_of_a_segmenter_is_predicted_with_its_heads_and_loss(memory, checkpoint_heads):
    torch.manual_seed(0)
    task = {"options": {**SMALL["task"]["options"], "checkpoint_heads": checkpoint_heads}}
    step = recipe_steps.create(RECIPE, **{**SMALL, "task": task})
    columns = next(module for module in step.modules() if isinstance(module, ReversibleColumns))
    columns.memory = memory
    images = torch.randn(2, *step.pretrained_cfg["input_size"])
    row = revnets.plan(step, images.shape, modes=[memory], optimizer="none").modes[0]
    assert row.peak - row.parameters == pytest.approx(peak_bytes(step, images), rel=0.03)


def test_classes_are_a_part_of_the_plan():
    peaks = []
    for classes in (7, 31):
        data = {**SMALL["data"], "num_classes": classes}
        with torch.device("meta"):
            step = recipe_steps.create(RECIPE, **{**SMALL, "data": data})
        peaks.append(revnets.plan(step, (2, 3, 97, 97), modes=["exact"], optimizer="none").modes[0].peak)
    scores = 2 * 97 * 97 * (31 - 7) * 4
    assert peaks[1] - peaks[0] > 2 * scores


def test_every_recipe_has_a_name():
    assert recipe_steps.names() == sorted(file.stem for folder in FOLDERS for file in folder.glob("*.yaml"))


@pytest.mark.parametrize("name", ["digits", "revcol_tiny_in1k"])
def test_the_step_of_a_classifier_is_its_model(name):
    with torch.device("meta"):
        step = recipe_steps.create(name).eval()
        scores = step(torch.empty(2, *step.pretrained_cfg["input_size"]))
    assert scores.shape == (2, 10 if name == "digits" else 1000)


def test_a_wrong_key_is_named():
    with raises_error(code="unknown-key", key="optimiser"):
        recipe_steps.create(RECIPE, optimiser={})


def test_a_recipe_that_does_not_exist():
    with raises_error(revnets.SpecError, code="unknown-choice", names="revcol_tiny_in1k"):
        recipe_steps.create("revcol_tiny_in1")
