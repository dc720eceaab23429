"""The defaults of a task: what a batch is, which value is better, what is printed."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.errors import raises_error
from tests.support.image_tasks import DataSplits, SpotDetection, Spots
from tests.support.training_runs import tiny
from vision.config.run import load_config
from vision.distributed.context import World
from vision.tasks import LossTask, Task, create_task
from vision.tasks.classification import Classification
from vision.tasks.intermediate_supervision import SupervisedClassification

Pair = namedtuple("Pair", "images targets")


class Movable:
    """An object that is not a tensor and can be moved."""

    def __init__(self, device: Any = "cpu"):
        self.device = device

    def to(self, device: torch.device) -> Movable:
        return Movable(device)


@pytest.fixture
def task() -> Task:
    return Task(load_config(tiny(Path("x"))))


def test_all_tensors_of_a_nested_batch_are_moved(task):
    image, movable = torch.rand(2, 3, 4, 5), Movable()
    meta = torch.device("meta")
    batch = {"pair": Pair(image, [torch.zeros(2), ("name", torch.ones(1))]), "other": movable, "count": 3}
    moved = task.to_device(batch, meta)
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].images.device == moved["pair"].targets[0].device == moved["pair"].targets[1][1].device == meta
    assert (moved["pair"].targets[1][0], moved["other"].device, moved["count"]) == ("name", meta, 3)
    assert type(moved["pair"].targets) is list


def test_only_images_use_channels_last(task):
    images, others = task.to_device(
        (torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4)), torch.device("cpu"), torch.channels_last
    )
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert others.is_contiguous()


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(5, 3),
        [torch.zeros(5, 3), torch.zeros(5)],
        ([torch.zeros(3, 4, 4)] * 5, [{"boxes": torch.zeros(2, 4)}] * 5),
        {"tokens": torch.zeros(5, 7), "mask": torch.zeros(5, 7)},
        ({"tokens": torch.zeros(5, 7)}, torch.zeros(5)),
    ],
)
def test_samples_of_a_batch(task, batch):
    assert task.batch_size(batch) == 5


def test_the_direction_of_a_metric(task):
    assert task.is_better(1.0, 2.0)
    assert not task.is_better(2.0, 1.0)
    classification = create_task(task.config)
    assert classification.is_better(2.0, 1.0)
    assert not classification.is_better(1.0, 2.0)


def test_summary_lines(task):
    assert task.summary({"raw": {"loss": 0.5}, "ema": {"loss": 0.25}}) == "val loss raw 0.5000  ema 0.2500"
    found = {"raw": {"loss": 0.5, "top1": 12.345, "top5": 50.0}}
    assert Classification(task.config).summary(found) == "val loss 0.5000  top-1 raw 12.35 %"
    assert [curve[:3] for curve in Classification.curves()] == [("top1", "validation top-1, %", "max")]


def test_the_key_supervision_selects_its_task():
    config = load_config(tiny(Path("x"), model={"timm": "test_revcol"}, supervision={"heads": 2}))
    assert type(create_task(config)) is SupervisedClassification
    assert type(create_task(config.model_copy(update={"supervision": None}))) is Classification


@pytest.mark.parametrize("named", [False, True])
def test_loss_of_several_terms(named):
    """Without a `loss` among them their sum is minimized."""

    def loss(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
        terms = {"a": model(batch).sum(), "b": model(batch).square().sum()}
        return {**terms, "loss": terms["b"]} if named else terms

    model, x = nn.Linear(3, 2), torch.rand(4, 3)
    found = LossTask(model, loss)(x)
    expected = model(x).square().sum() + (0 if named else model(x).sum())
    torch.testing.assert_close(found["loss"], expected)
    assert set(found) == {"a", "b", "loss"}


def test_several_processes_need_padding():
    own = {
        "task": {"type": "tests.support.image_tasks:SpotDetection", "length": 9},
        "mixup": None,
        "label_smoothing": 0.0,
    }
    task = create_task(load_config(tiny(Path("x"), **own)))
    assert isinstance(task, SpotDetection)
    data = DataSplits(Spots(9, 0), Spots(3, 0))
    assert sum(len(images) for images, _ in task.val_batches(data, World())) == 3
    with raises_error(code="invalid-value", key="task", names="SpotDetection"):
        task.val_batches(data, World(0, 2))


def test_a_budget_needs_samples_of_one_shape(tmp_path):
    from vision.training.train_state import TrainState

    model = {"timm": "test_revcol", "patch_size": 2, "dims": [4, 4, 6, 6], "in_chans": 1}
    config = load_config(tiny(tmp_path, model=model, memory={"budget": "1GiB"}))
    task = Classification(config)
    data = task.load_data()
    assert TrainState(config, data, 5, task=task).note is not None
    task.input_shape = lambda data: None
    with raises_error(code="missing-shape", key="memory.budget"):
        TrainState(config, data, 5, task=task)
