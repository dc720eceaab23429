"""Options of detectors, which are listed by functions and by classes."""

from inspect import signature

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("scipy")

from vision.detection import DINO, cascade_mask_rcnn, dino, htc
from vision.detection.dino_detr import dino_detector


def options(function):
    """Keyword-only options with their defaults."""
    parameters = signature(function).parameters.values()
    return {item.name: item.default for item in parameters if item.kind is item.KEYWORD_ONLY}


def test_dino_has_the_options_of_its_class():
    backbone = {"kernel_size": None, "memory": None, "scales": 4}
    assert options(dino) == options(DINO.__init__) | backbone


def test_dino_passes_on_every_option(monkeypatch):
    given = {name: object() for name in options(DINO.__init__)}
    found = {}
    monkeypatch.setattr(dino_detector, "revcol_levels", lambda *args, **kwargs: None)
    monkeypatch.setattr(dino_detector, "DINO", lambda backbone, num_classes, **kwargs: found.update(kwargs))
    dino("test_revcol", 3, **given)
    assert found == given


def test_htc_has_the_options_of_cascade_mask_rcnn():
    others = {"score_threshold": 0.001, "soft_nms": True}
    assert options(htc) == options(cascade_mask_rcnn) | others


@pytest.mark.parametrize("build", [cascade_mask_rcnn, htc])
def test_region_detectors_pass_on_every_option(monkeypatch, build):
    given = {name: object() for name in options(build)}
    found = []
    monkeypatch.setitem(build.__globals__, "build_detector", lambda *args: found.extend(args))
    build("test_revcol", 3, **given, drop_path_rate=0.5)
    heads, backbone = found[-2:]
    assert {*map(id, found), *map(id, heads.values())} >= set(map(id, given.values()))
    assert backbone == {"drop_path_rate": 0.5}
    assert set(heads) - {"stuff_classes"} == {"masks", "width", "mask_width", "threshold", "soft"}
