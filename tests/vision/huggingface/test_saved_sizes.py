"""A `config.json` is compared with the saved weights before memory is allocated."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import timm
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoModelForImageClassification, TimmBackboneConfig

from revnets.config.errors import ConfigError
from revnets.models.saved_folder import require_config
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
    """Limit the memory, so that a test fails if a large model is allocated."""
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


@pytest.mark.parametrize("kind", [RevColBackbone, RevColForImageClassification, AutoModelForImageClassification])
def test_quantized_weights_are_refused(folder, kind):
    change(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with raises_error(code="reserved-key", key="quantization_config"):
        kind.from_pretrained(folder)


def test_a_quantized_configuration_object_is_refused(folder):
    config = RevColBackboneConfig.from_pretrained(folder)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with raises_error(code="reserved-key", key="quantization_config"):
        RevColBackbone.from_pretrained(folder, config=config)


def test_quantized_weights_are_refused_by_their_configuration(folder):
    change(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with raises_error(code="reserved-key", key="quantization_config", source=folder / "config.json"):
        require_config(folder)


@pytest.mark.parametrize("kind", [RevColBackbone, RevColForImageClassification])
def test_an_adapter_is_refused(folder, tmp_path_factory, kind):
    """peft would load the model that it names, whose size nothing bounds."""
    adapter = tmp_path_factory.mktemp("adapter") / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": str(folder), "peft_type": "LORA"}))
    with raises_error(code="wrong-format", source=adapter, names="peft"):
        kind.from_pretrained(adapter.parent)


def test_a_subfolder_is_compared(folder):
    change(folder, dims=[2**15] * 4)
    with raises_error(code="weights-mismatch", source=folder):
        RevColBackbone.from_pretrained(folder.parent, subfolder=folder.name)


def test_a_classifier_with_many_classes_is_not_refused_as_larger(folder):
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
        ({"hidden_size": 2**15}, "", "weights-mismatch"),
        ({"hidden_size": 2**40}, "", "weights-mismatch"),
        ({"auxiliary_num_convs": 2**40}, "auxiliary_num_convs", "weights-mismatch"),
        ({"pool_scales": [1] * 999}, "pool_scales", "weights-mismatch"),
        ({"num_labels": 2**40}, "num_labels", "out-of-range"),
    ],
)
def test_larger_segmenters_than_the_weights_are_refused(segmenter, values, key, code):
    change(segmenter, **values)
    with raises_error(code=code, key=key):
        UperNet.from_pretrained(segmenter, ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("values", "key", "code"),
    [
        ({"hidden_size": -5}, "", "weights-mismatch"),
        ({"hidden_size": 10**30}, "", "invalid-value"),
        ({"hidden_size": "8"}, "", "invalid-value"),
        ({"auxiliary_in_channels": 3}, "weights", "weights-mismatch"),
        ({"num_labels": "1e9"}, "", "invalid-value"),
        ({"id2label": [1, 2]}, "", "invalid-value"),
        ({"backbone_config": None}, "backbone_config", "unknown-model"),
        ({"backbone_config": {"model_type": "resnet", "depths": [10**8]}}, "backbone_config", "unknown-model"),
        ({"backbone_config": {"model_type": "timm_backbone", "backbone": "vgg"}}, "backbone_config", "unknown-model"),
        ({"backbone": "microsoft/resnet-50"}, "backbone", "conflicting-values"),
        ({"use_pretrained_backbone": True}, "use_pretrained_backbone", "conflicting-values"),
        ({"configuration_files": ["config.4.0.0.json"]}, "configuration_files", "reserved-key"),
    ],
)
def test_damaged_configurations_are_refused(segmenter, values, key, code):
    change(segmenter, **values)
    with raises_error(code=code, key=key):
        UperNet.from_pretrained(segmenter)


def test_nested_configurations_are_refused(segmenter):
    path = segmenter / "config.json"
    path.write_text(json.dumps({"model_type": "other", "part": json.loads(path.read_text())}))
    with raises_error(code="wrong-format", key="model_type", source=path):
        UperNet.from_pretrained(segmenter)


def test_a_list_is_not_a_configuration(segmenter):
    (segmenter / "config.json").write_text("[1]")
    with raises_error(code="wrong-format", key="", source=segmenter / "config.json"):
        UperNet.from_pretrained(segmenter)


@pytest.mark.parametrize("name", ["config.json", ""])
def test_a_configuration_of_another_directory_is_compared(segmenter, tmp_path_factory, name):
    other = tmp_path_factory.mktemp("other")
    (other / "config.json").write_bytes((segmenter / "config.json").read_bytes())
    change(other, auxiliary_num_convs=2**40)
    with raises_error(code="weights-mismatch", key="auxiliary_num_convs", source=segmenter):
        UperNet.from_pretrained(segmenter, config=str(other / name))


def change_weights(folder, keep=lambda name: True, **new):
    path = folder / "model.safetensors"
    weights = {name: tensor for name, tensor in load_file(path).items() if keep(name)}
    save_file(weights | new, path, {"format": "pt"})


def test_a_segmenter_without_all_of_its_weights_is_refused(segmenter):
    change_weights(segmenter, lambda name: name != "decode_head.classifier.weight")
    with raises_error(code="weights-mismatch", key="weights", names="decode_head.classifier.weight"):
        UperNet.from_pretrained(segmenter)


def test_a_quantized_segmenter_is_refused(segmenter):
    change(segmenter, quantization_config={"quant_method": "gptq", "bits": 4})
    with raises_error(code="reserved-key", key="quantization_config", source=segmenter / "config.json"):
        UperNet.from_pretrained(segmenter)


def test_weights_of_no_layer_are_refused(segmenter):
    change_weights(segmenter, other=torch.zeros(3))
    with raises_error(code="weights-mismatch", key="weights", names="other"):
        UperNet.from_pretrained(segmenter)


def test_the_report_of_loading_names_missing_weights(segmenter):
    change_weights(segmenter, lambda name: name != "decode_head.classifier.bias")
    _, info = UperNet.from_pretrained(segmenter, output_loading_info=True)
    assert info["missing_keys"] == {"decode_head.classifier.bias"}


def test_pickled_weights_are_refused(segmenter):
    path = segmenter / "model.safetensors"
    torch.save(load_file(path), segmenter / "pytorch_model.bin")
    path.unlink()
    with raises_error(code="missing-weights", source=segmenter):
        UperNet.from_pretrained(segmenter)


def test_a_segmenter_can_get_a_classifier_for_other_classes(segmenter):
    model = UperNet.from_pretrained(segmenter, num_labels=7, ignore_mismatched_sizes=True)
    assert model.decode_head.classifier.out_channels == 7


def test_a_segmenter_loads_without_its_auxiliary_head(segmenter):
    assert UperNet.from_pretrained(segmenter, use_auxiliary_head=False).auxiliary_head is None


def test_a_segmenter_on_a_model_of_timm_still_loads(tmp_path):
    backbone = TimmBackboneConfig(backbone=MODEL, out_indices=[0, 1, 2, 3])
    upernet(backbone, 5, channels=8, auxiliary_channels=8).save_pretrained(tmp_path)
    assert UperNet.from_pretrained(tmp_path).revcol.num_features


def test_a_saved_backbone_still_loads(tmp_path):
    AutoBackbone.from_config(RevColBackboneConfig(name=MODEL)).save_pretrained(tmp_path)
    assert torch.is_tensor(RevColBackbone.from_pretrained(tmp_path)(torch.randn(1, 3, 37, 41)).feature_maps[0])
