"""Detectors as a task of the trainer."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("faster_coco_eval")

import revnets
from tests.support import coco_files
from tests.support.errors import raises_error
from vision.cli.evaluate import evaluate_checkpoint
from vision.config.run import load_config
from vision.data.dataset import ImageData
from vision.distributed.context import World
from vision.tasks import create_task, recipe_steps
from vision.tasks.object_detection import in_pixels_of_file
from vision.training.loaded_run import load_checkpoint
from vision.training.run_log import read_log
from vision.training.trainer import Trainer

SMALL = {"channels": 16, "width": 32, "mask_width": 16}
DETECTORS = {
    "cascade_mask_rcnn": {"options": SMALL},
    "htc": {"options": {**SMALL, "stuff_classes": 3}, "copy_paste": 0.5},
    "dino": {
        "options": {"width": 32, "feedforward": 32, "heads": 2, "encoder_layers": 1, "decoder_layers": 2}
        | {"queries": 20, "denoising": 5}
    },
}
LEVEL = {"dim": 8, "depth": 1, "block": "convnext"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return coco_files.make_files(tmp_path_factory.mktemp("coco"), train=8)


def run(root, output, **options):
    return load_config(
        {
            "model": {"timm": "test_revcol"},
            "task": "tests.support.coco_files:SmallMaskRCNN",
            "output": str(output),
            "data": coco_files.values(root),
            "epochs": 2,
            "batch_size": 2,
            "save_every": 3,
            "keep": 5,
            "optimizer": {"lr": 0.003},
            "device": "cpu",
            **options,
        }
    )


def weights(folder):
    return load_checkpoint(folder, trust=True).weight_sets["raw"][0]


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    Trainer(run(root, output)).fit()
    return output


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_trains_and_is_evaluated(tmp_path, detector):
    files = coco_files.make_files(tmp_path / "coco", train=2, val=1)
    (files / "maps").mkdir()
    for number in range(2):
        Image.fromarray(np.full(coco_files.SIZE, number, np.uint8)).save(files / f"maps/{number}.png")
    data = coco_files.values(files) | ({"stuff_maps": "maps"} if detector == "htc" else {})
    data["masks"] = detector != "dino"
    task = {"type": "object_detection", "detector": detector, **DETECTORS[detector]}
    Trainer(run(files, tmp_path / "run", task=task, data=data, epochs=1)).fit()
    train, evaluated = read_log(tmp_path / "run/log.jsonl")
    parts = [value for name, value in train.items() if name.startswith("loss_")]
    assert sum(parts) == pytest.approx(train["loss"], rel=1e-5)
    assert 0 <= evaluated["raw_box_ap"] <= 100


def test_a_dino_starts_from_the_weights_of_another(root, tmp_path):
    task = {"type": "object_detection", "detector": "dino", **DETECTORS["dino"]}
    data = coco_files.values(root) | {"masks": False}
    config = run(root, tmp_path / "run", task=task, data=data, pretrained={"source": str(tmp_path / "given.pt")})
    detection = create_task(config)
    loaded = detection.load_data()
    torch.manual_seed(1)
    given, model = detection.build_model(loaded), detection.build_model(loaded)
    torch.save({"model": given.state_dict(), "classes": list(loaded.classes)}, tmp_path / "given.pt")
    detection.begin(model, loaded, World())
    for name, tensor in given.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_losses_and_metrics_are_logged(trained):
    log = read_log(trained / "log.jsonl")
    train = next(line for line in log if line["kind"] == "train")
    names = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
    assert set(names) <= set(train)
    evaluated = next(line for line in log if line["kind"] == "eval")
    assert {"raw_box_ap", "raw_box_ap50", "raw_mask_ap", "raw_mask_ap50"} <= set(evaluated)


def test_a_run_that_is_resumed_ends_with_the_same_bits(root, trained, tmp_path):
    middle = trained / "checkpoints/step-0000006.pt"
    Trainer(run(root, tmp_path / "run", resume=str(middle))).fit()
    expected = weights(trained / "checkpoints/step-0000008.pt")
    for name, tensor in weights(tmp_path / "run/checkpoints/step-0000008.pt").items():
        assert torch.equal(tensor, expected[name]), name


def test_exact_training_ends_with_the_weights_of_store(root, trained, tmp_path):
    Trainer(run(root, tmp_path / "run", memory="store")).fit()
    expected = weights(trained / "checkpoints/step-0000008.pt")  # in exact, the default
    for name, tensor in weights(tmp_path / "run/checkpoints/step-0000008.pt").items():
        assert torch.equal(tensor, expected[name]), name


def test_a_checkpoint_is_evaluated_as_in_its_run(trained):
    metrics = evaluate_checkpoint(trained / "checkpoints/step-0000008.pt", trust=True)["raw"]
    line = [line for line in read_log(trained / "log.jsonl") if line["kind"] == "eval"][-1]
    assert {f"raw_{name}": value for name, value in metrics.scalars().items()}.items() <= line.items()


def test_several_processes_evaluate_as_one(root, trained):
    """Each with its share of three images, filled up with one that does not count."""
    config = run(root, trained)
    task = create_task(config)
    data = task.load_data()
    found = []
    for rank in range(2):
        world = World(rank, 2)
        for images, targets in task.val_batches(data, world):
            found += [int(target["image_id"]) for target in targets]
            assert len(images) == len(targets)
    assert sorted(found) == [-1, 0, 1, 2]


def test_detections_are_in_pixels_of_the_file():
    output = {
        "boxes": torch.tensor([[2.0, 4.0, 12.0, 20.0], [-4.0, 0.0, 99.0, 50.0]]),
        "labels": torch.tensor([1, 2]),
        "scores": torch.tensor([0.5, 0.25]),
        "masks": torch.zeros(2, 1, 40, 60),
    }
    output["masks"][0, 0, 4:20, 2:12] = 1
    found = in_pixels_of_file(output, (40, 60), [80, 30])
    torch.testing.assert_close(found["boxes"], torch.tensor([[1.0, 8, 6, 40], [0, 0, 30, 80]]).double())
    expected = torch.zeros(80, 30, dtype=torch.bool)
    expected[8:40, 1:6] = True
    assert torch.equal(found["masks"][0], expected)
    assert not found["masks"][1].any()
    empty = in_pixels_of_file({name: tensor[:0] for name, tensor in output.items()}, (40, 60), [80, 30])
    assert empty["masks"].shape == (0, 80, 30)


def test_the_model_is_built_without_the_data(root, tmp_path):
    task = create_task(run(root, tmp_path / "run"))
    model = task.build_model(ImageData(None, None, ("a", "b", "c"), (3, 8, 8), (0.0,), (1.0,)))
    assert model.roi_heads.box_predictor.cls_score.out_features == 4


@pytest.mark.parametrize(
    ("changes", "code", "key"),
    [
        ({"task": {"type": "object_detection", "detector": "yolo"}}, "unknown-choice", "task.detector"),
        ({"task": "object_detection", "data": {"name": "digits"}}, "conflicting-values", "data"),
        ({"model": {"columns": 2, "stem": "patchify", "levels": [LEVEL, LEVEL]}}, "invalid-component", "model"),
        ({"task": {"type": "object_detection", "planned_objects": 0}}, "out-of-range", "task.planned_objects"),
        ({"task": "classification"}, "conflicting-values", "data.name"),
        ({"model": {"timm": "test_revcol", "kernel": 7}}, "component-failed", "model"),
    ],
)
def test_invalid_runs_are_refused(root, tmp_path, changes, code, key):
    def begin():
        task = create_task(load_config({**run(root, tmp_path / "run").plain(), **changes}))
        task.build_model(task.load_data())

    with raises_error(code=code, key=key):
        begin()


@pytest.mark.parametrize(
    ("task", "maps"),
    [
        ({"detector": "htc", "options": {"stuff_classes": 3}}, {}),
        ({"detector": "htc"}, {"stuff_maps": "maps"}),
        ({"detector": "cascade_mask_rcnn", "options": {"stuff_classes": 3}}, {"stuff_maps": "maps"}),
    ],
)
def test_semantic_maps_are_read_by_a_detector_with_stuff_classes_alone(root, tmp_path, task, maps):
    (root / "maps").mkdir(exist_ok=True)
    data = coco_files.values(root) | maps
    detection = create_task(run(root, tmp_path / "run", task={"type": "object_detection", **task}, data=data))
    with raises_error(code="conflicting-values", key="data.stuff_maps"):
        detection.train_batches(detection.load_data(), World())


def test_a_detector_without_memory_for_its_weights_is_refused(root, tmp_path):
    task = {"type": "object_detection", "options": {"channels": 2**40}}
    detection = create_task(run(root, tmp_path / "run", task=task))
    with raises_error(code="component-failed", key="model"):
        detection.build_model(detection.load_data())


def renamed(found):
    found["categories"][0]["name"] = "zebra"


def in_another_order(found):
    found["categories"] = [{"id": 3, "name": "green"}, {"id": 7, "name": "red"}]


def with_other_ids(found):
    found["categories"][1]["id"] = 8
    for item in found["annotations"]:
        item["category_id"] += item["category_id"] == 7


def with_one_more(found):
    found["categories"].append({"id": 9, "name": "blue"})


@pytest.mark.parametrize("change", [renamed, in_another_order, with_other_ids, with_one_more])
def test_a_checkpoint_is_not_evaluated_on_other_classes(trained, tmp_path, change):
    files = coco_files.make_files(tmp_path / "coco", train=2, val=1)
    for split in ("train", "val"):
        found = coco_files.read(files, split)
        change(found)
        coco_files.write(files, split, found)
    with raises_error(code="class-mismatch", key="data"):
        evaluate_checkpoint(trained / "checkpoints/step-0000008.pt", [f"data.root={files}"], trust=True)


def test_the_step_of_another_detector_cannot_be_planned(root, tmp_path):
    task = create_task(run(root, tmp_path / "run"))
    model = task.build_model(task.load_data())
    with raises_error(code="conflicting-values", key="task", names="revnets plan test_revcol"):
        task.planned(model)


@pytest.mark.parametrize(
    ("recipe", "side"),
    [("coco_cascade_revcol_base_3x", 1333), ("coco_htc_revcol_huge", 1600), ("coco_dino_revcol_huge", 1333)],
)
def test_the_step_of_a_recipe_can_be_planned(recipe, side):
    options = {"task": {"planned_objects": 3}, "model": {"timm": "test_revcol", "kernel_size": 3}}
    if "cascade" in recipe:
        options["model"] = {"timm": "test_revcol"}
    with torch.device("meta"):
        step = recipe_steps.create(recipe, **options)
    assert step.pretrained_cfg["input_size"] == (3, side, side)
    peaks = {row.mode: row.peak for row in revnets.plan(step, (1, 3, 96, 128), modes=["store", "exact"]).modes}
    assert peaks["exact"] < peaks["store"]


@pytest.mark.parametrize("detector", ["cascade_mask_rcnn", "dino"])
def test_a_run_with_a_memory_budget_ends_with_the_same_bits(tmp_path, detector):
    files = coco_files.make_files(tmp_path / "coco", train=4, val=1)
    task = {"type": "object_detection", "detector": detector, **DETECTORS[detector], "planned_objects": 5}
    found = []
    for memory in ("store", {"budget": "exact"}):
        output = tmp_path / f"run{len(found)}"
        trainer = Trainer(run(files, output, task=task, memory=memory, epochs=1, data=coco_files.values(files)))
        trainer.fit()
        found.append(weights(output))
    assert "Chosen for" in trainer.state.note
    assert [name for name, tensor in found[1].items() if not torch.equal(tensor, found[0][name])] == []


def test_a_detector_of_masks_needs_masks(root, tmp_path):
    data = {**coco_files.values(root), "masks": False}
    with raises_error(code="conflicting-values", key="data.masks"):
        create_task(run(root, tmp_path / "run", data=data))
