"""Learning rates and weight decay of models with a RevCol backbone compared with those of the classifier."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from tests.support.errors import raises_error
from vision.config.run import load_config
from vision.models.parameter_groups import find_backbone, parameter_groups
from vision.tasks import builders
from vision.training.memory_budget import optimizer_states


class Detector(nn.Module):
    """Features of some levels with a head; it has no methods for optimizers."""

    def __init__(self, name: str, levels: tuple[int, ...], **options):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, out_indices=levels, **options)
        self.head = nn.Conv2d(self.body.feature_info.channels()[-1], 5, 1)


def detector(name="revcol_tiny", levels=(0, 1, 2, 3), **options):
    with torch.device("meta"):
        return Detector(name, levels, **options)


def classifier(name="revcol_tiny", **options):
    with torch.device("meta"):
        return timm.create_model(name, num_classes=7, **options)


def by_name(model, groups, key):
    found = {id(parameter): group[key] for group in groups for parameter in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters() if id(parameter) in found}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("revcol_tiny", {}),
        ("revcol_base", {"drop_path_rate": 0.4}),
        ("revcol_huge", {"kernel_size": 7}),
        ("revcol_vit_small", {"img_size": 64}),
    ],
)
def test_rates_and_decay_of_a_backbone_are_those_of_the_classifier(name, options):
    model, other = detector(name, **options), classifier(name, **options)
    groups = parameter_groups(model, weight_decay=0.05, layer_decay=0.8)
    reference = param_groups_layer_decay(
        other, weight_decay=0.05, layer_decay=0.8, no_weight_decay_list=other.no_weight_decay()
    )
    for key in ("lr_scale", "weight_decay"):
        ours = {inner.removeprefix("body.model."): value for inner, value in by_name(model, groups, key).items()}
        theirs = by_name(other, reference, key)
        body = {inner for inner in ours if not inner.startswith("head.")}
        assert len(body) > 100
        assert {inner: ours[inner] for inner in body} == {inner: theirs[inner] for inner in body}
        assert ours["head.weight"] == theirs["head.fc.weight"]
        assert ours["head.bias"] == theirs["head.fc.bias"]


def test_frozen_cells_are_omitted_and_do_not_change_rates():
    whole, model = detector(), detector(levels=(0, 1))
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen
    expected, found = (
        by_name(one, parameter_groups(one, weight_decay=0.1, layer_decay=0.7), "lr_scale") for one in (whole, model)
    )
    assert set(found) == {name for name, _ in model.named_parameters()} - frozen
    assert found == {name: expected[name] for name in found}


def test_backbone_lr_scale_scales_the_backbone():
    model = detector("test_revcol")
    scale = by_name(model, parameter_groups(model, 0.05, backbone_lr_scale=0.1), "lr_scale")
    assert {value for name, value in scale.items() if name.startswith("body.")} == {0.1}
    assert {value for name, value in scale.items() if name.startswith("head.")} == {1.0}


def test_both_scales_multiply():
    model = detector("test_revcol")
    plain, scaled = (by_name(model, parameter_groups(model, 0.05, 0.5, scale), "lr_scale") for scale in (1.0, 0.25))
    ratios = {name: scaled[name] / value for name, value in plain.items()}
    assert ratios == {name: 0.25 if name.startswith("body.") else 1.0 for name in plain}


@pytest.mark.parametrize("segmenter", ["upernet", "mask2former"])
def test_groups_of_a_segmenter_are_those_of_timm(segmenter):
    pytest.importorskip("transformers")
    import vision.segmentation

    small = {"width": 32, "feedforward": 32, "queries": 5, "encoder_layers": 1, "decoder_layers": 1, "heads": 2}
    options = small if segmenter == "mask2former" else {"channels": 8, "auxiliary_channels": 8}
    with torch.device("meta"):
        model = getattr(vision.segmentation, segmenter)("test_revcol", 5, **options)
    expected = param_groups_layer_decay(
        model, weight_decay=0.05, layer_decay=0.9, no_weight_decay_list=model.no_weight_decay()
    )
    assert parameter_groups(model, weight_decay=0.05, layer_decay=0.9) == expected


def test_a_cascade_of_this_package_has_the_rates_of_its_backbone():
    from vision.detection import cascade_mask_rcnn

    with torch.device("meta"):
        model = cascade_mask_rcnn("test_revcol", 3)
    prefix, backbone = find_backbone(model)
    with torch.device("meta"):
        other = timm.create_model("test_revcol", num_classes=7)
    scale = by_name(model, parameter_groups(model, 0.05, 0.5), "lr_scale")
    expected = by_name(other, param_groups_layer_decay(other, layer_decay=0.5), "lr_scale")
    inside = {name for name, _ in backbone.named_parameters()}
    assert {name: scale[prefix + name] for name in inside} == {name: expected[name] for name in inside}
    assert {value for name, value in scale.items() if not name.startswith(prefix)} == {1.0}


def optimizer_of(model, **optimizer):
    config = load_config({"model": {"timm": "test_revcol"}, "output": "x", "optimizer": {"lr": 0.5, **optimizer}})
    built = builders.build_optimizer(config, model, 64)
    schedule = builders.build_schedule(config, built, 10, 64)
    schedule.step_update(1)
    return built


def test_the_trainer_finds_the_backbone_of_a_model_without_an_order_of_layers():
    model = detector("test_revcol")
    built = optimizer_of(model, layer_decay=0.5, backbone_lr_scale=0.5, weight_decay=0.3)
    rate = by_name(model, built.param_groups, "lr")
    highest = max(value for name, value in rate.items() if name.startswith("body."))
    assert highest == pytest.approx(rate["head.weight"] * 0.25)
    assert by_name(model, built.param_groups, "weight_decay")["head.weight"] == 0.3


def test_a_memory_plan_counts_the_states_of_such_an_optimizer():
    optimizer = {"name": "adamw", "layer_decay": 0.5, "backbone_lr_scale": 0.1}
    config = load_config({"model": {"timm": "test_revcol"}, "output": "x", "optimizer": optimizer})
    assert optimizer_states(config) == 2


@pytest.mark.parametrize("key", ["layer_decay", "backbone_lr_scale"])
def test_models_without_a_backbone_are_refused(key):
    with raises_error(code="conflicting-values", key=f"optimizer.{key}"):
        optimizer_of(nn.Linear(2, 3), **{key: 0.5})


def test_find_backbone_returns_none_for_a_revcol():
    model = classifier("test_revcol")
    assert find_backbone(model) is None
    with raises_error(code="conflicting-values", key="optimizer.backbone_lr_scale"):
        optimizer_of(model, backbone_lr_scale=0.5)


def test_a_classifier_of_the_backbone_does_not_change_the_rates_of_the_heads():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = timm.create_model("test_revcol", num_classes=3), nn.Linear(3, 5)

    model = Wrapped()
    groups = parameter_groups(model, 0.05, None, 0.1)
    scales = by_name(model, groups, "lr_scale")
    assert {scales[name] for name in scales if name.startswith("net.")} == {0.1}
    assert {scales[name] for name in scales if name.startswith("head.")} == {1.0}
