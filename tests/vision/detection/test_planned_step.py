"""Predicted and measured memory of the training step of a whole detector."""

from functools import partial

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("scipy")

import revnets
from revnets.memory.tracker import peak_bytes
from tests.support.detection import SMALL
from tests.support.two_processes import in_two_processes
from vision.detection import DetectionStep, cascade_mask_rcnn, dino, htc

SHAPE = (2, 3, 96, 64)
SAMPLED = 61
OBJECTS = 20  # of an image, more than boxes of objects that are sampled
BUILDERS = {
    "cascade": (cascade_mask_rcnn, SMALL),
    "htc": (htc, {**SMALL, "stuff_classes": 7}),
    "dino": (
        dino,
        {"width": 32, "feedforward": 64, "heads": 2, "encoder_layers": 2, "decoder_layers": 2, "queries": 30},
    ),
}


def build(name, **options):
    torch.manual_seed(0)
    builder, own = BUILDERS[name]
    model = builder("test_revcol", 5, **own, **options).train()
    for stage in model.roi_heads.box_stages if name != "dino" else ():
        stage.sampler.batch_size_per_image = SAMPLED
    return model


def planned_peak(step, memory):
    """Return the predicted peak without weights, in bytes."""
    row = revnets.plan(step, SHAPE, modes=[memory], optimizer="none").modes[0]
    return row.peak - row.parameters


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("memory", "recomputes"), [("store", False), ("exact", False), ("exact", True)])
def test_the_peak_of_a_detector_is_predicted(name, memory, recomputes):
    step = DetectionStep(build(name, memory=memory, checkpoint_heads=recomputes), OBJECTS)
    assert 0.999 < planned_peak(step, memory) / peak_bytes(step, torch.randn(SHAPE)) < 1.03


def test_the_plan_is_an_upper_bound_for_fewer_sampled_boxes():
    step = DetectionStep(build("cascade", memory="exact"), 2)
    assert planned_peak(step, "exact") > peak_bytes(step, torch.randn(SHAPE))


def test_more_objects_take_more_memory():
    peaks = [planned_peak(DetectionStep(build("cascade", memory="store"), count), "store") for count in (3, 300)]
    assert peaks[1] > peaks[0]


def test_a_plan_can_be_made_on_the_meta_device_and_after_a_step():
    with torch.device("meta"):
        expected = planned_peak(DetectionStep(build("cascade", memory="store"), OBJECTS), "store")
    step = DetectionStep(build("cascade", memory="store"), OBJECTS)
    sum(step(torch.randn(SHAPE)).values()).backward()
    step.zero_grad(set_to_none=True)
    assert planned_peak(step, "store") == expected


def test_a_budget_is_met_by_a_real_step():
    step = DetectionStep(build("cascade", memory="store", checkpoint_heads=True), OBJECTS)
    columns = revnets.find_columns(step)
    peaks = {memory: planned_peak(step, memory) for memory in ("store", "exact")}
    weights = sum(tensor.nbytes for tensor in (*step.parameters(), *step.buffers()))
    budget = weights + (peaks["store"] + peaks["exact"]) // 2
    revnets.plan(step, SHAPE, optimizer="none", budget=budget, modes=()).apply(step)
    assert columns.stored or set(columns.memory) != {"store"}
    assert weights + peak_bytes(step, torch.randn(SHAPE)) <= budget


def _plan_synchronized(expected, name, rank):
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(build(name, memory="store"))
    assert planned_peak(DetectionStep(model, OBJECTS), "store") == expected


@pytest.mark.parametrize("name", ["cascade", "dino"])
def test_processes_plan_without_communication(tmp_path, name):
    """Plans use no collectives and support SyncBatchNorm."""
    expected = planned_peak(DetectionStep(build(name, memory="store"), OBJECTS), "store")
    in_two_processes(partial(_plan_synchronized, expected, name), tmp_path)


@pytest.mark.parametrize(
    ("detector", "objects", "key", "code"),
    [
        (torch.nn.Linear(2, 3), 1, "detector", "invalid-component"),
        (torch.nn.Linear(2, 3), 0, "objects", "out-of-range"),
        (torch.nn.Linear(2, 3), "many", "objects", "wrong-type"),
    ],
)
def test_invalid_steps_are_refused(detector, objects, key, code):
    with pytest.raises(ValueError) as caught:
        DetectionStep(detector, objects)
    assert (caught.value.key, caught.value.code) == (key, code)
