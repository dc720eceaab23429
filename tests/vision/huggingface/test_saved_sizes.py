"""What a `config.json` asks for is compared with the weights beside it, before anything is allocated."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import timm
from transformers import AutoBackbone, AutoModelForImageClassification

from revnets.config.errors import ConfigError
from tests.support.errors import raises_error
from vision.huggingface import RevColBackbone, RevColBackboneConfig, RevColForImageClassification
from vision.segmentation import upernet
from vision.segmentation.segmenters import UperNet

MODEL = "test_revcol"


def change(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    inner = config.get("backbone_config", config)
    for key, value in values.items():
        (inner if key in inner else config)[key] = value
    path.write_text(json.dumps(config))


@pytest.fixture(autouse=True)
def no_room():
    """Memory for what is here, and none for what a configuration may ask for."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def folder(tmp_path):
    model = timm.create_model(MODEL, num_classes=3)
    RevColForImageClassification.from_timm(model, ["cat", "dog", "cow"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"columns": 900}, "columns"),
        ({"depths": [1, 1, 900, 1]}, "columns"),
        ({"dims": [2**15] * 4}, "dims"),
        ({"num_channels": 2**16, "dims": [2**14] * 4}, "dims"),
    ],
)
@pytest.mark.parametrize("kind", [RevColBackbone, RevColForImageClassification, AutoModelForImageClassification])
def test_larger_models_than_the_weights_are_refused(folder, values, key, kind):
    change(folder, **values)
    with raises_error(code="weights-mismatch", key=key, source=folder):
        kind.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_more_columns_than_a_network_has_are_refused(folder):
    change(folder, columns=2**40)
    with pytest.raises(ConfigError):
        RevColBackbone.from_pretrained(folder)


def test_a_subfolder_is_compared(folder):
    change(folder, dims=[2**15] * 4)
    with raises_error(code="weights-mismatch", source=folder):
        RevColBackbone.from_pretrained(folder.parent, subfolder=folder.name)


def test_a_classifier_of_many_classes_is_no_larger_model(folder):
    options = {"num_labels": 21841, "ignore_mismatched_sizes": True}
    assert RevColForImageClassification.from_pretrained(folder, **options).revcol.head.fc.out_features == 21841


def test_damaged_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with raises_error(code="damaged-file", source=path):
        RevColBackbone.from_pretrained(folder)


@pytest.fixture
def segmenter(tmp_path):
    upernet(MODEL, 5, channels=8, auxiliary_channels=8).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("values", "key", "code"),
    [
        ({"columns": 900}, "columns", "weights-mismatch"),
        ({"hidden_size": 2**15}, "dims", "weights-mismatch"),
        ({"hidden_size": 2**40}, "dims", "weights-mismatch"),
        ({"auxiliary_num_convs": 2**40}, "auxiliary_num_convs", "weights-mismatch"),
        ({"pool_scales": [1] * 999}, "pool_scales", "weights-mismatch"),
        ({"num_labels": 2**40}, "num_labels", "out-of-range"),
    ],
)
def test_larger_segmenters_than_the_weights_are_refused(segmenter, values, key, code):
    change(segmenter, **values)
    with raises_error(code=code, key=key):
        UperNet.from_pretrained(segmenter, ignore_mismatched_sizes=True)


def test_a_saved_backbone_still_loads(tmp_path):
    AutoBackbone.from_config(RevColBackboneConfig(name=MODEL)).save_pretrained(tmp_path)
    assert torch.is_tensor(RevColBackbone.from_pretrained(tmp_path)(torch.randn(1, 3, 37, 41)).feature_maps[0])
