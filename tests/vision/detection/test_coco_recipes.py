"""Recipes for COCO: the numbers of Table 13 or, where the release differs, its own; models on the meta device."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch

pytest.importorskip("faster_coco_eval")

from vision.config.run import load_config
from vision.models.parameter_groups import find_backbone
from vision.paths import CONFIGS
from vision.tasks import builders

# Learning rate, layer decay, drop path, parameters in millions.
CASCADE = {
    "tiny": (2e-4, 0.85, 0.3, 87.94),
    "small": (2e-4, 0.85, 0.4, 118.05),
    "base": (2e-4, 0.9, 0.4, 196.07),
    "base_22k": (1e-4, 0.9, 0.4, 196.07),
    "large_22k": (1e-4, 0.85, 0.5, 330.31),
}
HUGE = ("coco_htc_revcol_huge", "coco_dino_revcol_huge")


def model_of(config):
    with torch.device("meta"):
        task = builders.create_task(config)
        return task.build_model(SimpleNamespace(classes=tuple(map(str, range(80)))))


def millions(model):
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def rates(config, model):
    """Return the relative learning rate and the weight decay of each parameter by name."""
    groups = builders.build_optimizer(config, model, 16).param_groups
    found = {id(p): (group.get("lr_scale", 1.0), group["weight_decay"]) for group in groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("size", CASCADE)
def test_cascade_has_the_numbers_of_the_release(size):
    config = load_config(f"coco_cascade_revcol_{size}_3x")
    lr, decay, drop_path, count = CASCADE[size]
    optimizer, schedule, data = config.optimizer, config.schedule, config.data
    assert (config.epochs, config.batch_size, config.amp) == (36, 2, "float16")
    assert (optimizer.lr, optimizer.weight_decay, optimizer.layer_decay) == (lr, 0.05, decay)
    assert (schedule.name, schedule.milestones, schedule.decay_rate) == ("step", (27, 33), 0.1)
    assert (schedule.warmup_updates, schedule.warmup_ratio) == (500, 0.001)
    assert data.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (data.long_side, data.val_short_side, data.hflip, data.crop) == (1333, 800, 0.5, 0.5)
    assert (data.crop_short_sides, data.crop_sizes, data.keep_empty) == ((400, 500, 600), (384, 600), False)
    assert config.model.options == {"drop_path_rate": drop_path}
    assert timm.is_model_pretrained(config.pretrained.source)
    model = model_of(config)
    assert millions(model) == pytest.approx(count, abs=0.01)
    of_each = rates(config, model)
    prefix, revcol = find_backbone(model)
    assert {scale for name, (scale, _) in of_each.items() if not name.startswith(prefix)} == {1.0}
    depth = sum(level.depth for level in revcol.spec.levels) + revcol.spec.columns
    assert of_each[f"{prefix}stem.conv.weight"] == (pytest.approx(decay**depth), 0.05)
    assert all(of_each[name][1] == 0.0 for name, parameter in model.named_parameters() if parameter.ndim <= 1)


@pytest.mark.parametrize(("recipe", "count"), [(HUGE[0], 2222), (HUGE[1], 2185.6)])
def test_huge_has_kernels_of_7(recipe, count):
    config = load_config(recipe)
    assert config.model.options["kernel_size"] == 7
    assert millions(model_of(config)) == pytest.approx(count, abs=0.5)


def test_dino_has_a_backbone_at_a_tenth_of_the_rate():
    config = load_config("coco_dino_revcol_huge")
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.clip_grad) == (1e-4, 1e-4, 0.1)
    model = model_of(config)
    prefix, _ = find_backbone(model)
    of_each = rates(config, model)
    assert {scale for name, (scale, _) in of_each.items() if name.startswith(prefix)} == {0.1}
    assert {scale for name, (scale, _) in of_each.items() if not name.startswith(prefix)} == {1.0}


def test_htc_reads_maps_of_stuff():
    config = load_config("coco_htc_revcol_huge")
    assert config.data.stuff_maps is not None
    assert config.task["options"] == {"stuff_classes": 183}
    assert config.data.short_sides == tuple(range(400, 1401, 40))


def test_every_recipe_round_trips_through_plain_data():
    found = sorted(path.stem for path in (CONFIGS / "detection").glob("*.yaml"))
    assert found == sorted([*HUGE, *(f"coco_cascade_revcol_{size}_3x" for size in CASCADE)])
    for recipe in found:
        config = load_config(recipe)
        assert load_config(config.plain()) == config
