"""Initialization of detectors from detectors with other classes."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from vision.config.learning import PretrainedConfig
from vision.detection import cascade_mask_rcnn, dino
from vision.detection.class_transfer import OBJECTS365_ROWS, begin_detector, class_rows
from vision.errors import CheckpointError

GIVEN = ("Luggage", "Person", "Wild Bird", "Zebra", "Stuffed Toy")
WANTED = ("person", "bird", "cat", "suitcase")
ROWS = [1, 2, None, 0]
SMALL = {"width": 32, "feedforward": 64, "heads": 2, "encoder_layers": 1, "decoder_layers": 1, "queries": 7}


def build(classes, seed=0, **options):
    torch.manual_seed(seed)
    return dino("test_revcol", classes, **{**SMALL, **options})


def saved(path, model, **others):
    torch.save({"model": model.state_dict(), **others}, path)
    return PretrainedConfig(source=str(path))


def test_rows_are_matched_by_name():
    assert class_rows(GIVEN, WANTED) == ROWS


def test_all_classes_of_coco_are_in_objects365():
    wanted = list(OBJECTS365_ROWS)
    rows = class_rows(365, wanted)
    assert len(set(rows)) == 80
    assert all(row is not None and 0 <= row < 365 for row in rows)
    assert class_rows(365, ["Hair Dryer", "tv", "tower"]) == [328, 37, None]


def test_files_without_names_are_recognized_by_the_number_of_classes():
    assert class_rows(4, WANTED) == [0, 1, 2, 3]
    assert class_rows(7, WANTED) == [None] * 4


def test_weights_of_classes_are_matched_by_name(tmp_path):
    source, model, fresh = build(5, seed=1), build(4), build(4)
    text = begin_detector(model, saved(tmp_path / "source.pt", source, classes=list(GIVEN)), WANTED)
    assert "3 of 4 classes" in text
    given, expected, found = source.state_dict(), fresh.state_dict(), model.state_dict()
    by_class = model.class_parameters()
    assert len(by_class) == 2 * 2 + 1
    for name, tensor in found.items():
        if name not in by_class:
            assert torch.equal(tensor, given[name]), name
            continue
        for new, old in enumerate(ROWS):
            assert torch.equal(tensor[new], expected[name][new] if old is None else given[name][old]), name


def test_new_heads_are_those_of_the_initialization(tmp_path):
    source, model, fresh = build(4, seed=1), build(4), build(4)
    config = saved(tmp_path / "source.pt", source).model_copy(update={"head": "new"})
    assert "0 of 4 classes" in begin_detector(model, config, WANTED)
    for name in model.class_parameters():
        assert torch.equal(model.state_dict()[name], fresh.state_dict()[name])


def test_denoising_is_not_needed_on_either_side(tmp_path):
    plain = build(4, seed=1, denoising=0)
    model = build(4)
    begin_detector(model, saved(tmp_path / "plain.pt", plain), WANTED)
    assert torch.equal(model.contents.weight, plain.contents.weight)
    begin_detector(plain, saved(tmp_path / "other.pt", build(4, seed=2)), WANTED)
    assert not torch.equal(model.contents.weight, plain.contents.weight)


@pytest.mark.parametrize("create", [build, lambda classes: cascade_mask_rcnn("test_revcol", classes)])
def test_weights_of_a_backbone_go_into_the_backbone(tmp_path, create):
    source, model = build(4, seed=1), create(4)
    torch.save(source.revcol.state_dict(), tmp_path / "backbone.pt")
    begin_detector(model, PretrainedConfig(source=str(tmp_path / "backbone.pt")), WANTED)
    revcol = model.backbone.revcol if hasattr(model.backbone, "revcol") else model.revcol
    for name, tensor in source.revcol.state_dict().items():
        assert torch.equal(revcol.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("options", "others"), [({"queries": 11}, {}), ({}, {"classes": ["a", "b"]}), ({"scales": 5}, {})]
)
def test_weights_of_another_detector_are_refused(tmp_path, options, others):
    config = saved(tmp_path / "other.pt", build(4, **options), **others)
    with pytest.raises(CheckpointError) as caught:
        begin_detector(build(4), config, WANTED)
    assert caught.value.code == "weights-mismatch"
    assert "other.pt" in str(caught.value)
