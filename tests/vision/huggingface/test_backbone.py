"""RevCol as a backbone of transformers."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import timm
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

from revnets import SpecError
from vision.errors import CheckpointError
from vision.huggingface import RevColBackbone, RevColBackboneConfig, RevColForImageClassification

SIZE = (67, 97)
"""Sides of images: primes, not multiples of the strides."""


def backbone(**options):
    torch.manual_seed(0)
    config = RevColBackboneConfig(name="test_revcol", **options)
    return AutoBackbone.from_config(config)


def test_feature_maps_are_the_levels_of_timm():
    model = backbone(out_indices=[0, 2, 3]).eval()
    torch.manual_seed(0)
    reference = timm.create_model("test_revcol", num_classes=0).eval()
    reference.load_state_dict(model.revcol.state_dict(), strict=False)
    images = torch.randn(2, 3, *SIZE)
    levels = reference.forward_intermediates(images, intermediates_only=True)
    for ours, index in zip(model(images).feature_maps, (0, 2, 3), strict=True):
        assert torch.equal(ours, levels[index])


def test_weights_keep_the_initialization_of_timm():
    model = backbone(out_indices=[0, 1, 2, 3])
    torch.manual_seed(0)
    reference = timm.create_model("test_revcol", num_classes=0)
    for name, parameter in model.revcol.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(name)), name


def test_levels_above_the_highest_output_are_removed():
    model = backbone(out_features=["stage1", "stage2"])
    assert model.channels == [8, 16]
    assert model.revcol.levels == 2


def test_hidden_states_are_all_levels():
    model = backbone(out_features=["stage4"]).eval()
    output = model(torch.randn(1, 3, *SIZE), output_hidden_states=True)
    assert [state.shape[1] for state in output.hidden_states] == model.num_features
    assert torch.equal(output.hidden_states[-1], output.feature_maps[0])


def test_the_configuration_stores_every_option(tmp_path):
    options = {"columns": 5, "dims": [8, 16, 24, 40], "depths": [1, 2, 1, 1], "kernel_size": 7, "drop_path_rate": 0.1}
    options |= {"init": "fast"}
    model = backbone(**options, num_channels=2, memory={"budget": "1GiB"}, out_indices=[1, 3])
    model.save_pretrained(tmp_path)
    again = RevColBackbone.from_pretrained(tmp_path)
    assert again.config.init == "fast"
    assert again.config.spec() == model.config.spec()
    assert again.revcol.spec == model.revcol.spec
    assert again.channels == [16, 40]


def test_saved_weights_give_equal_features(tmp_path):
    model = backbone(out_indices=[1, 3]).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, *SIZE)
    again = RevColBackbone.from_pretrained(tmp_path).eval()
    for ours, saved in zip(model(images).feature_maps, again(images).feature_maps, strict=True):
        assert torch.equal(ours, saved)


def test_a_classifier_becomes_a_backbone(tmp_path):
    classifier = RevColForImageClassification(RevColBackboneConfig(name="test_revcol", num_labels=5)).eval()
    classifier.save_pretrained(tmp_path)
    model, info = RevColBackbone.from_pretrained(tmp_path, out_indices=[3], output_loading_info=True)
    assert not info["missing_keys"]
    images = torch.randn(1, 3, *SIZE)
    expected = classifier.revcol.forward_features(images)
    assert torch.equal(model.eval()(images).feature_maps[0], expected)


@pytest.mark.parametrize("memory", ["exact", "recompute"])
def test_gradients_of_a_segmenter_equal_those_of_store(memory):
    def gradients(mode):
        torch.manual_seed(0)
        config = RevColBackboneConfig(name="test_revcol", memory=mode, out_indices=[0, 1, 2, 3])
        segmenter = UperNetForSemanticSegmentation(
            UperNetConfig(
                backbone_config=config,
                hidden_size=16,
                auxiliary_in_channels=config.hidden_sizes[2],
                auxiliary_channels=8,
                num_labels=7,
            )
        )
        torch.manual_seed(1)
        images, labels = torch.randn(2, 3, *SIZE), torch.randint(0, 7, (2, *SIZE))
        segmenter(images, labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in segmenter.named_parameters()}

    expected = gradients("store")
    for name, gradient in gradients(memory).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_segmenter_round_trip_keeps_the_kernel_size(tmp_path):
    config = RevColBackboneConfig(name="test_revcol", kernel_size=7, out_indices=[0, 1, 2, 3])
    options = {"auxiliary_in_channels": config.hidden_sizes[2], "auxiliary_channels": 8, "hidden_size": 16}
    UperNetForSemanticSegmentation(UperNetConfig(backbone_config=config, **options)).save_pretrained(tmp_path)
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert again.config.backbone_config.kernel_size == 7
    assert again.backbone.revcol.spec.levels[0].options["kernel_size"] == 7


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"name": "revcol_gigantic"}, "name"),
        ({"name": "../../etc/passwd"}, "name"),
        ({"dims": [8, 16]}, "dims"),
        ({"dims": [8, 16, 24, 2**40]}, "dims"),
        ({"num_channels": 0}, "num_channels"),
        ({"num_labels": 2**40}, "num_labels"),
    ],
)
def test_invalid_values_are_refused(options, key):
    with pytest.raises(ValueError) as caught:
        RevColBackboneConfig(**{"name": "test_revcol", **options})
    assert caught.value.key == key


def test_options_of_other_components_are_refused():
    with pytest.raises(SpecError) as caught:
        backbone(img_size=64)
    assert caught.value.code == "unknown-key"


def test_missing_weights_are_refused(tmp_path):
    backbone(columns=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"columns": 3}))
    with pytest.raises(CheckpointError) as caught:
        RevColBackbone.from_pretrained(tmp_path)
    assert caught.value.code == "weights-mismatch"
