"""Fine-tuning: recipes of Table 12, initial weights of a run, and learning rates by depth."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from tests.support import official_reference as official
from tests.support.errors import raises_error
from tests.support.official_reference import TEST, Net
from tests.support.training_runs import tiny
from vision.checkpoints import reader
from vision.config.learning import PretrainedConfig
from vision.config.run import load_config
from vision.data.dataset import ImageData, load_data
from vision.detection.feature_pyramid import revcol_levels
from vision.errors import CheckpointError
from vision.models.architecture import RevCol
from vision.paths import CONFIGS
from vision.tasks import builders
from vision.training.train_state import TrainState
from vision.training.trainer import Trainer
from vision.weights import finetune
from vision.weights.convert import convert_file

RECIPES = sorted(path.stem for path in (CONFIGS / "finetune").glob("*.yaml"))

# By Table 12, or where the released configuration differs by that: resolution, epochs, peak learning rate and its end
# at 512 images, layer decay, drop path, averaged weights, clipping.
TABLE = {
    "revcol_base_ft_224_in1k": (224, 30, 5e-5, 1e-7, 0.9, 0.2, False, 10),
    "revcol_base_ft_384_in1k": (384, 30, 5e-5, 1e-7, 0.9, 0.2, False, 10),
    "revcol_large_ft_224_in1k": (224, 30, 2.5e-5, 1e-7, 0.8, 0.3, False, 10),
    "revcol_large_ft_384_in1k": (384, 30, 2.5e-5, 1e-7, 0.8, 0.3, False, 10),
    "revcol_xlarge_ft_384_in1k": (384, 30, 1e-5, 1e-7, 0.8, 0.4, True, 10),
    "revcol_huge_ft_640_in1k": (640, 20, 2e-5, 1e-8, 0.8, 0.4, True, 100),
}


@pytest.mark.parametrize("recipe", TABLE)
def test_recipe_has_the_numbers_of_the_paper(recipe):
    config = load_config(recipe)
    resolution, epochs, peak, end, layer_decay, drop_path, averaged, clip = TABLE[recipe]
    gpus = 512 // config.batch_size
    assert gpus == (64 if config.parallel == "fsdp" else 8)
    factor = config.optimizer.lr_factor(512)
    assert (config.optimizer.lr * factor, config.schedule.min_lr * factor) == pytest.approx((peak, end))
    assert (config.data.img_size, config.epochs, config.clip_grad) == (resolution, epochs, clip)
    assert config.data.crop_mode == ("center" if resolution == 224 else "squash")
    assert config.data.crop_pct == (0.875 if resolution == 224 else 1.0)
    assert config.optimizer.layer_decay == layer_decay
    assert config.model.options == {"drop_path_rate": drop_path}
    assert config.model.timm == re.match("revcol_[a-z]+(?=_ft)", recipe)[0]
    assert (config.ema is not None) == averaged
    assert (config.supervision, config.mixup, config.schedule.warmup_epochs) == (None, None, 0)
    assert (config.data.augment.auto_augment, config.data.augment.re_prob) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (config.label_smoothing, config.optimizer.weight_decay) == (0.1, 1e-8)
    assert (config.pretrained.head, config.pretrained.head_init_scale) == ("new", 1e-3)


def test_every_recipe_round_trips_through_plain_data():
    assert set(RECIPES) == {*TABLE, "digits_ft"}
    for recipe in RECIPES:
        config = load_config(recipe)
        assert load_config(config.plain()) == config
        assert timm.is_model_pretrained(config.pretrained.source) == ("base" in recipe or "large_" in recipe[:13])


@pytest.mark.parametrize(("recipe", "millions"), [("revcol_base_ft_384_in1k", 138), ("revcol_huge_ft_640_in1k", 2157)])
def test_recipe_builds_its_model_for_its_images(recipe, millions):
    config = load_config(recipe)
    side = config.data.img_size
    data = ImageData(None, None, tuple(map(str, range(1000))), (3, side, side), config.data.mean, config.data.std)
    with torch.device("meta"):
        model = builders.build_model(config, data)
    assert int(sum(parameter.numel() for parameter in model.parameters()) / 1e6) == millions
    optimizer = builders.build_optimizer(config, model, 512)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, model.parameters()))


# ------------------------------------------------------------------------------------------- learning rates by depth

TOP = {"tiny": 14, "small": 18, "base": 23, "large": 19, "xlarge": 19, "huge": 19}


def depth_of(name: str, depths: list[int], top: int) -> int:
    """The depth of a parameter in the grid of columns and blocks, as the official code counts: block + column + 1."""
    if not (found := re.match(r"columns\.cells\.(\d+)\.(\d+)\.(gain|function\.(?:fusion|blocks\.(\d+)))", name)):
        return 0 if name.startswith("stem.") else top
    column, level, block = int(found[1]), int(found[2]), int(found[4] or 0)
    return column + 1 + (0 if found[3] == "gain" else sum(depths[:level]) + block)


@pytest.mark.parametrize("size", TOP)
def test_learning_rates_fall_with_the_depth_in_the_grid(size):
    with torch.device("meta"):
        model = timm.create_model(f"revcol_{size}")
    config = load_config("revcol_base_ft_224_in1k", ["optimizer.layer_decay=0.8", "optimizer.weight_decay=0.05"])
    optimizer = builders.build_optimizer(config, model, 512)
    builders.build_schedule(config, optimizer, 10, 512)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    depths = [level.depth for level in model.spec.levels]
    for name, parameter in model.named_parameters():
        group = group_of.pop(id(parameter))
        expected = 5e-5 * 0.8 ** (TOP[size] - depth_of(name, depths, TOP[size]))
        assert group["lr"] == pytest.approx(expected), name
        is_matrix = name.endswith("weight") and re.search(r"conv|linear|fc\d?\.", name)
        assert group["weight_decay"] == (0.05 if is_matrix else 0), name
    assert not group_of


def test_learning_rates_by_depth_when_supervised():
    overrides = ["model={timm: test_revcol}", "supervision={heads: 2}", "data.img_size=32"]
    config = load_config("revcol_base_ft_224_in1k", overrides)
    with torch.device("meta"):
        model = timm.create_model("test_revcol", num_classes=3)
        data = load_data(load_config(tiny(Path("x"))).data, seed=0)
        task = builders.build_task(config, model, data, torch.device("meta"))
    optimizer = builders.build_optimizer(config, task.get_trainable_module(), 512)
    scale_of = {id(parameter): group["lr_scale"] for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in task.get_trainable_module().named_parameters():
        depth = depth_of(name.removeprefix("model."), [1, 1, 2, 1], 9)
        assert scale_of[id(parameter)] == pytest.approx(0.9 ** (9 - depth)), name


# ------------------------------------------------------------------------------------------------- where a run begins


def begun(source, classes: int = 3, **options):
    """A new model with the weights of a file, and the description of them."""
    kwargs = {key: options.pop(key) for key in ("in_chans", "kernel_size", "columns") if key in options}
    model = timm.create_model(options.pop("model", "test_revcol"), num_classes=classes, **kwargs).eval()
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = PretrainedConfig(source=str(source), **options)
    return model, fresh, finetune.begin(model, config, tuple(map(str, range(classes))))


@torch.no_grad()
@pytest.mark.parametrize("supervised", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_starts_from_official_weights_with_a_small_new_classifier(tmp_path, supervised, ours):
    net = Net(4, (8, 16, 32, 64), (1, 1, 2, 1), supervised=supervised)
    state, average = official.random_state(net, 1), official.random_state(net, 2)
    path = official.save_classification(tmp_path / "official.pth", state, average)
    for weights, values in (("raw", state), ("ema", average)):
        source = path
        if ours:
            source = tmp_path / f"{weights}.safetensors"
            convert_file(path, source, weights=weights, heads=supervised)
        model, fresh, message = begun(source, weights="raw" if ours else weights)
        image = torch.randn(1, 3, 64, 64)
        levels = official.forward(values, net, image)[2]
        assert_close(model.forward_features(image), levels[-1], atol=1e-5 * levels[-1].abs().max().item(), rtol=1e-5)
        assert_close(model.head.fc.weight, fresh["head.fc.weight"] * 1e-3)
        assert torch.equal(model.head.norm.weight, torch.ones(64))
        assert str(source) in message
        assert "a new classifier for 3 classes" in message


@torch.no_grad()
def test_classifier_of_equal_classes_is_kept_unless_new(tmp_path):
    state = official.random_state(TEST)
    path = official.save_classification(tmp_path / "official.pth", state)
    model, _, message = begun(path, classes=11)
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), official.forward(state, TEST, image)[0][0], atol=1e-5, rtol=1e-5)
    assert message.endswith("its classifier")
    model, fresh, message = begun(path, classes=11, head="new", head_init_scale=0.5)
    assert_close(model.head.fc.weight, fresh["head.fc.weight"] * 0.5)
    assert "new classifier for 11" in message


def test_backbone_and_images_with_one_channel(tmp_path):
    net = Net(4, (8, 16, 32, 64), (1, 1, 2, 1), headless=True)
    state = official.random_state(net)
    path = official.save_openmmlab(tmp_path / "detector.pth", state, {"neck.conv.bias": (4,)})
    model, fresh, _ = begun(path, in_chans=1)
    assert_close(model.stem.conv.weight.data, state["stem.0.weight"].sum(1, keepdim=True))
    assert_close(model.head.fc.weight.data, fresh["head.fc.weight"] * 1e-3)


def test_unusable_weights_are_reported_on_one_line(tmp_path, monkeypatch):
    path = official.save_classification(tmp_path / "official.pth", official.random_state(TEST))
    cut = tmp_path / "cut.pth"
    cut.write_bytes(path.read_bytes()[:-9000])
    (tmp_path / "empty").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("no weights")

    def offline(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("timm.models._hub.download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    wider = {"columns": 5}
    for source, options, code, names in (
        (tmp_path / "none.pth", {}, "missing-file", ()),
        ("revcol_base.in2k", {}, "missing-file", "Did you mean revcol_base.in22k?"),
        (tmp_path / "empty", {}, "missing-file", ()),
        (cut, {}, "damaged-file", ()),
        (tmp_path / "text.pth", {}, "wrong-format", ()),
        (tmp_path / "other.safetensors", {}, "missing-weights", ()),
        (path, {"weights": "ema"}, "missing-weights", "averaged"),
        (path, {"model": "test_revcol_huge"}, "weights-mismatch", ["test_revcol_huge", " more"]),
        (path, wider, "weights-mismatch", ["test_revcol", "missing subnet4", " more"]),
        (path, {"model": "test_resnet"}, "weights-mismatch", ["test_resnet", "missing conv1"]),
        (
            "revcol_base.in22k",
            {},
            "download-failed",
            ["Network is unreachable", "docs/guides/pretrained-weights.md"],
        ),
    ):
        with raises_error(CheckpointError, code=code, source=source, names=names) as error:
            begun(source, **options)
        assert len(str(error.value)) < 500


@torch.no_grad()
def test_starts_from_weights_downloaded_by_timm(tmp_path, monkeypatch):
    net = Net(4, (64, 128, 256, 512), (2, 2, 4, 2), classes=1000, supervised=True)
    state = official.random_state(net)

    def fetch(url, path, *args, **kwargs):
        assert url.endswith("/revcol_tiny_1k.pth")
        official.save_classification(Path(path), state)

    monkeypatch.setattr("timm.models._hub.download_url_to_file", fetch)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model, fresh, message = begun("revcol_tiny.in1k", model="revcol_tiny")
    assert "revcol_tiny.in1k" in message
    assert torch.equal(model.stem.conv.weight, state["stem.0.weight"])
    assert_close(model.head.fc.weight, fresh["head.fc.weight"] * 1e-3)


# ------------------------------------------------------------------------------------------------------ a whole run


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A run on digits, from which others start."""
    output = tmp_path_factory.mktemp("first")
    Trainer(load_config(tiny(output, epochs=1, model=MODEL, ema={"decay": 0.9, "warmup": False}))).fit()
    return output


MODEL = {"timm": "test_revcol", "patch_size": 2, "dims": [3, 4, 5, 6], "columns": 2}
DATA = {"name": "digits", "img_size": 8}


def engine(source, **changes) -> TrainState:
    data = load_data(load_config(tiny(Path("x"), data=DATA)).data, seed=0)
    start = {"pretrained": {"source": str(source), **changes.pop("pretrained", {})}, "model": MODEL, **changes}
    return TrainState(load_config(tiny(Path("x"), **start)), data, 5)


def test_a_run_starts_from_another(first):
    """From its directory or file, its weights or their average. Averages start from them, and heads are new."""
    best = first / "checkpoints" / "best.pt"
    saved = reader.read(best)
    assert saved["classes"] == [str(digit) for digit in range(10)]
    for source, weights, key in ((first, "ema", "ema"), (best, "raw", "model")):
        mine = engine(source, pretrained={"weights": weights}, supervision={"heads": 2})
        for model in (mine.model, mine.ema):
            assert_close(dict(model.state_dict()), dict(saved[key]), rtol=0, atol=0)
        assert mine.beginning == f"{weights} weights of {best} and its classifier"
    named = TrainState(
        load_config(tiny(Path("x"), model=MODEL, pretrained={"source": str(first)})),
        load_renamed(),
        5,
    )
    assert "a new classifier for 10 classes" in named.beginning  # as many, but others


def load_renamed():
    data = load_data(load_config(tiny(Path("x"), data=DATA)).data, seed=0)
    return replace(data, classes=tuple("abcdefghij"))


def test_networks_of_the_engine_start_from_networks(tmp_path):
    saved = Trainer(load_config(tiny(tmp_path / "run", epochs=1))).fit().last
    mine = engine(saved, model=tiny(Path("x"))["model"])
    assert_close(dict(mine.model.state_dict()), dict(reader.read(saved)["model"]), rtol=0, atol=0)
    fresh = TrainState(load_config(tiny(Path("x"))), load_renamed(), 5)
    new = engine(saved, model=tiny(Path("x"))["model"], pretrained={"head": "new"})
    assert_close(new.model.head.fc.weight, fresh.model.head.fc.weight * 1e-3)
    deeper = {**tiny(Path("x"))["model"], "columns": 2}
    with raises_error(CheckpointError, code="weights-mismatch", source=saved, names="columns.cells.2"):
        engine(saved, model=deeper)


def test_another_timm_model_starts_from_its_own_weights(tmp_path):
    source = timm.create_model("test_resnet", num_classes=7)
    save_file(source.state_dict(), tmp_path / "resnet.safetensors")
    model, fresh, message = begun(tmp_path / "resnet.safetensors", model="test_resnet", in_chans=1)
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    assert_close(model.fc.weight.data, fresh["fc.weight"] * 1e-3)
    assert "new classifier" in message


def test_the_message_about_a_backbone_does_not_mention_a_classifier(tmp_path):
    source = timm.create_model("test_resnet", num_classes=7)
    save_file(source.state_dict(), tmp_path / "resnet.safetensors")
    _, _, message = begun(tmp_path / "resnet.safetensors", model="test_resnet", in_chans=1, classes=0)
    assert "classifier" not in message


def test_a_resumed_run_needs_no_pretrained_weights(tmp_path, first, capsys):
    changes = {"model": MODEL, "epochs": 1, "save_every": None}
    config = tiny(tmp_path / "run", **changes, pretrained={"source": str(first)})
    before = Trainer(load_config(config)).fit().last
    assert "Starts from raw weights of" in capsys.readouterr().out
    moved = first.rename(tmp_path / "moved")
    try:
        longer = Trainer(load_config({**config, "epochs": 2}))
        assert longer.fit().last != before
        assert "Begins" not in capsys.readouterr().out
        with raises_error(code="settings-differ", key="pretrained.source", names=[str(moved), str(first)]):
            Trainer(load_config({**config, "epochs": 3, "pretrained": {"source": str(moved)}})).fit()
    finally:
        moved.rename(first)


@pytest.mark.parametrize(
    ("override", "code", "key", "names"),
    [
        ("pretrained={}", "missing-key", "pretrained.source", "source: revcol_base_22k.pth"),
        ("pretrained=x.pth", "wrong-type", "pretrained", ["x.pth", "mapping"]),
        ("pretrained.weights=best", "unknown-choice", "pretrained.weights", "best"),
        ("pretrained.head_init_scale=-1", "out-of-range", "pretrained.head_init_scale", "-1"),
        ("pretrained.path=x", "unknown-key", "pretrained.path", "x"),
    ],
)
def test_wrong_keys_are_reported_on_one_line(override, code, key, names):
    with raises_error(code=code, key=key, names=names):
        load_config("revcol_base_ft_224_in1k", [override])


def test_the_backbone_of_a_detector_takes_the_weights_of_a_classifier(tmp_path):
    classifier = timm.create_model("test_revcol", num_classes=3)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pt")
    backbone = revcol_levels("test_revcol")
    revcol = next(module for module in backbone.modules() if isinstance(module, RevCol))
    finetune.begin(revcol, PretrainedConfig(source=str(tmp_path / "classifier.pt")), ())
    assert revcol.state_dict()
    for name, tensor in revcol.state_dict().items():
        assert torch.equal(tensor, classifier.state_dict()[name]), name
