"""Recipes for ADE20K: the numbers of Table 14 or, where the release differs, its own; models on the meta device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

import timm

from vision.config.run import load_config
from vision.models.parameter_groups import find_backbone
from vision.paths import CONFIGS
from vision.tasks import builders

# Crop, stride of the windows, images of a GPU, learning rate, warm-up in updates, layer decay, width of the decoder,
# kernel size, parameters in millions.
UPERNET = {
    "tiny": (512, 341, 2, 6e-5, 1500, None, 512, None, 60.25),
    "small": (512, 341, 2, 4e-5, 1500, None, 512, None, 90.36),
    "base": (512, 426, 2, 4e-5, 1500, None, 512, None, 168.87),
    "base_22k": (640, 426, 2, 4e-5, 1500, 0.9, 512, None, 168.87),
    "large_22k": (640, 426, 2, 4e-5, 3000, 0.9, 512, None, 306.6),
    "huge": (640, 426, 1, 4e-5, 3000, 0.9, 1440, 7, 2426.3),
}
MASK2FORMER = "ade20k_mask2former_revcol_huge"


def model_of(config):
    with torch.device("meta"):
        task = builders.create_task(config)
        return task.build_model(SimpleNamespace(classes=tuple(map(str, range(150)))))


def millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def rates(config, model):
    """Return the relative learning rate and the weight decay of each parameter by name."""
    groups = builders.build_optimizer(config, model, 16).param_groups
    found = {id(p): (group.get("lr_scale", 1.0), group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", UPERNET)
def test_upernet_has_the_numbers_of_the_release(size):
    config = load_config(f"ade20k_upernet_revcol_{size}")
    crop, stride, images, lr, warmup, decay, width, kernel, count = UPERNET[size]
    data, optimizer, schedule = config.data, config.optimizer, config.schedule
    assert (data.img_size, data.window, data.stride, data.short_side, data.long_side) == (
        *(crop, crop, stride),
        *(crop, 4 * crop),
    )
    assert (data.num_classes, data.reduce_zero_label, data.scale) == (150, True, (0.5, 2.0))
    assert (config.updates, config.batch_size, config.amp) == (160_000, images, "float16")
    assert (optimizer.lr, optimizer.weight_decay, optimizer.layer_decay) == (lr, 0.01, decay)
    assert optimizer.options == {"betas": [0.9, 0.999]}
    assert (schedule.name, schedule.power, schedule.min_lr) == ("poly", 1.0, 0.0)
    assert (schedule.warmup_updates, schedule.warmup_ratio) == (warmup, 1e-6)
    assert config.task["options"] == {"channels": width, "auxiliary_channels": 256, "dropout": 0.1}
    assert config.model.options == {"drop_path_rate": 0.3} | ({"kernel_size": kernel} if kernel else {})
    assert timm.is_model_pretrained(config.pretrained.source) == (size != "huge")
    model = model_of(config)
    assert millions(model) == pytest.approx(count, abs=0.05)
    of_each = rates(config, model)
    assert of_each["decode_head.classifier.weight"] == (1.0, 0.01)
    assert of_each["decode_head.classifier.bias"] == (1.0, 0.0)
    prefix, revcol = find_backbone(model)
    depth = sum(level.depth for level in revcol.spec.levels) + revcol.spec.columns
    lowest = of_each[f"{prefix}stem.conv.weight"]
    assert lowest == (pytest.approx(1.0 if decay is None else decay**depth), 0.01)
    assert all(
        of_each[name][1] == 0.0
        for name, parameter in model.named_parameters()
        if parameter.ndim <= 1 or name.endswith("gain.weight")
    )


def test_upernet_of_huge_has_the_parameters_of_the_paper_with_its_first_kernels():
    config = load_config("ade20k_upernet_revcol_huge", ["model.kernel_size=3"])
    assert millions(model_of(config)) == pytest.approx(2421.1, abs=0.05)


def test_mask2former_has_a_backbone_at_a_tenth_of_the_rate():
    config = load_config(MASK2FORMER)
    assert (config.updates, config.batch_size, config.clip_grad) == (160_000, 2, 0.01)
    assert (config.schedule.power, config.schedule.min_lr, config.optimizer.lr) == (0.9, 0.0, 1e-4)
    assert config.model.options["kernel_size"] == 13
    model = model_of(config)
    assert millions(model) == pytest.approx(2175.6 + 20.7, abs=0.1)
    prefix, _ = find_backbone(model)
    of_each = rates(config, model)
    assert {scale for name, (scale, _) in of_each.items() if name.startswith(prefix)} == {0.1}
    assert {scale for name, (scale, _) in of_each.items() if not name.startswith(prefix)} == {1.0}
    free = [name for name in of_each if "queries" in name or name.endswith("level_embed")]
    assert free
    assert {of_each[name][1] for name in free} == {0.0}


def test_every_recipe_round_trips_through_plain_data():
    found = sorted(path.stem for path in (CONFIGS / "segmentation").glob("*.yaml"))
    assert found == sorted([MASK2FORMER, *(f"ade20k_upernet_revcol_{size}" for size in UPERNET)])
    for recipe in found:
        config = load_config(recipe)
        assert load_config(config.plain()) == config
