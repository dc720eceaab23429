"""Every recipe can be read, builds its model, and has the numbers of Table 11."""

from __future__ import annotations

import pytest
import torch

from tests.support.errors import raises_error
from vision.config.data import ImagesConfig
from vision.config.run import load_config
from vision.data.dataset import ImageData
from vision.paths import CONFIGS
from vision.tasks import builders

RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

# By Table 11: epochs, warm-up, images of an update, peak learning rate, weight decay, drop path, parameters in millions
# (Table 1; 22K and large data: with the classifier of 21841 classes).
TABLE = {
    "revcol_tiny_in1k": (300, 20, 4096, 4e-3, 0.05, 0.1, 30),
    "revcol_small_in1k": (300, 20, 4096, 4e-3, 0.05, 0.3, 60),
    "revcol_base_in1k": (300, 20, 4096, 4e-3, 0.05, 0.4, 138),
    "revcol_base_in22k": (90, 5, 4096, 5e-4, 0.1, 0.3, 150),
    "revcol_large_in22k": (90, 5, 4096, 5e-4, 0.1, 0.3, 294),
    "revcol_xlarge_in22k": (90, 5, 4096, 5e-4, 0.1, 0.4, 871),
    "revcol_xlarge_168m": (10, 0.15, 5120, 6.25e-4, 0.05, 0.2, 871),
    "revcol_huge_168m": (10, 0.15, 5120, 6.25e-4, 0.05, 0.2, 2218),  # with a second set of classes
    "revcol_vit_small_in1k": (300, 20, 4096, 4e-3, 0.05, 0.1, 20),
    "revcol_vit_base_in1k": (300, 20, 4096, 4e-3, 0.05, 0.2, 89),
}


def data_of(config) -> ImageData:
    data = config.data
    if isinstance(data, ImagesConfig):
        shape, count, statistics = (3, data.img_size, data.img_size), data.num_classes or 1000, (data.mean, data.std)
        count = sum(config.heads.values()) if config.heads else count
    else:
        shape, count, statistics = (1, data.img_size, data.img_size), 10, ((0.5,), (0.5,))
    return ImageData(None, None, tuple(map(str, range(count))), shape, *statistics)


@pytest.mark.parametrize("recipe", RECIPES)
def test_builds_its_model_and_task(recipe):
    config = load_config(recipe)
    data = data_of(config)
    with torch.device("meta"):
        model = builders.build_model(config, data)
        task = builders.build_task(config.model_copy(update={"ema": None}), model, data, torch.device("meta"))
    optimizer = builders.build_optimizer(config, task.get_trainable_module(), 64)
    groups = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert groups == set(task.parameters())
    if recipe in TABLE:
        millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        assert int(millions) == TABLE[recipe][-1]


@pytest.mark.parametrize("recipe", TABLE)
def test_has_the_numbers_of_the_paper(recipe):
    config = load_config(recipe)
    epochs, warmup, images, peak, decay, drop_path, _ = TABLE[recipe]
    gpus = 64 if config.grad_accum == 1 else 8
    assert config.batch_size * config.grad_accum * gpus == images
    assert config.optimizer.lr * config.optimizer.lr_factor(images) == pytest.approx(peak)
    assert (config.epochs, config.schedule.warmup_epochs, config.optimizer.weight_decay) == (epochs, warmup, decay)
    assert config.model.options["drop_path_rate"] == drop_path
    assert config.label_smoothing == 0.1
    assert config.data.augment.auto_augment == "rand-m9-mstd0.5-inc1"
    is_large = recipe.endswith("168m")
    assert (config.mixup is None) == is_large
    assert config.data.augment.re_prob == (0.0 if is_large else 0.25)
    assert (config.ema is None) == (not recipe.endswith("in1k"))
    assert (config.supervision is None) == ("vit" in recipe)
    assert (config.parallel == "fsdp") == ("xlarge" in recipe or "huge" in recipe)
    if config.supervision is not None:
        columns = {"tiny": 4, "small": 8, "base": 16, "large": 8, "xlarge": 8, "huge": 8}[recipe.split("_")[1]]
        stops = config.supervision.stops(columns)
        assert [stop.alpha for stop in stops] == pytest.approx([3, 2, 1, 0])
        assert [stop.beta for stop in stops] == pytest.approx([0.175, 0.35, 0.525, 1])


def test_every_recipe_of_the_paper_exists():
    assert set(TABLE) | {"digits", "fashion"} == set(RECIPES)


@pytest.mark.parametrize(
    ("overrides", "code", "key", "names"),
    [
        (["model.colums=3"], "unknown-key", "model.colums", "Did you mean columns?"),
        (["model.num_classes=7"], "class-mismatch", "model.num_classes", ["7 scores", "1000 classes"]),
        (["model.memory=exakt"], "unknown-choice", "model.memory", "exakt"),
        (["memory=[exact]"], "conflicting-values", "memory", ["1 ", "4 columns"]),
        (["model={timm: resnet18}", "memory=exact"], "no-columns", "memory", ()),
        (["model={timm: resnet18}"], "no-columns", "supervision", "ResNet"),
        (["model={timm: revcol_tinny}"], "unknown-model", "model.timm", ["revcol_tinny", "revcol_tiny?"]),
        (["model={timm: 3}"], "wrong-type", "model.timm", "3"),
        (["supervision.alpha=[1,2]"], "wrong-length", "supervision.alpha", ["2 weights", "4 heads"]),
        (["data.augment.auto_augment=random"], "invalid-syntax", "data.augment.auto_augment", ["random", "rand-m9"]),
        (["data.agument=3"], "unknown-key", "data.agument", "augment?"),
        (["data.root=null"], "missing-key", "data.root", "data.root="),
        (["data.name=hfds/"], "unknown-choice", "data.name", "hfds/"),
        (["compile=inductr"], "unknown-choice", "compile", ["inductr", "inductor"]),
        (["checkpoint=sharded"], "conflicting-values", "checkpoint", "fsdp"),
        (["parallel=fsdp", "clip_mode=agc"], "conflicting-values", "clip_mode", "agc"),
    ],
)
def test_a_wrong_key_is_reported_on_one_line(overrides, code, key, names):
    def build():
        config = load_config("revcol_tiny_in1k", overrides)
        data = data_of(config)
        builders.build_task(config, builders.build_model(config, data), data, torch.device("meta"))

    with raises_error(code=code, key=key, names=names), torch.device("meta"):
        build()


def test_learning_rates_scale_with_the_images_of_an_update():
    config = load_config("revcol_tiny_in1k")
    parameter = torch.nn.Linear(2, 2)
    optimizer = builders.build_optimizer(config, parameter, 2048)
    schedule = builders.build_schedule(config, optimizer, updates_per_epoch=10, images_per_update=2048)
    seen = []
    for step in (0, 200, 2999, 3000):
        schedule.step_update(step)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen[0] == pytest.approx(2e-5)
    assert seen[1] == pytest.approx(2e-3, rel=0.02)
    assert seen[2] == pytest.approx(2e-6, rel=0.01)


def test_fine_tuning_has_smaller_rates_at_lower_layers():
    config = load_config("revcol_tiny_in1k", ["supervision=null", "optimizer.layer_decay=0.5", "data.img_size=32"])
    with torch.device("meta"):
        model = builders.build_model(config, data_of(config))
    optimizer = builders.build_optimizer(config, model, 1024)
    rates = {id(p): group["lr"] * group.get("lr_scale", 1) for group in optimizer.param_groups for p in group["params"]}
    stem, head = rates[id(model.stem.conv.weight)], rates[id(model.get_classifier().weight)]
    assert head == pytest.approx(1e-3)
    assert stem == pytest.approx(1e-3 * 0.5**14)  # RevCol-T has 14 steps from the stem to the head


def test_weights_that_a_model_exempts_do_not_decay_when_it_is_supervised():
    config = load_config("revcol_vit_small_in1k", ["supervision={alpha: 0.0}", "ema=null"])
    data = data_of(config)
    with torch.device("meta"):
        task = builders.build_task(config, builders.build_model(config, data), data, torch.device("meta"))
    optimizer = builders.build_optimizer(config, task.get_trainable_module(), 1024)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    model = task.get_eval_model()
    assert decays[id(model.stem.pos_embed)] == 0
    assert decays[id(model.stem.conv.weight)] == 0.05


@pytest.mark.parametrize("recipe", ["revcol_xlarge_168m", "revcol_huge_168m"])
def test_large_data_have_soft_labels_of_several_heads(recipe):
    config = load_config(recipe)
    assert config.heads == {"in22k": config.data.num_classes, "places": 365}
    assert (config.data.head, config.data.labels) == ("in22k", "data/large-labels")
    plain = load_config(recipe, ["heads=null", "data.head=null", "data.labels=null", "data.root=/data/shards"])
    assert plain.heads is None
