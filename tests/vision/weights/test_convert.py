"""Conversion of official checkpoints to ours and back: every name, every value, every output."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from tests.support import official_reference as official
from tests.support.errors import raises_error
from tests.support.official_reference import TEST, TEST_HUGE, Net
from vision.config.learning import SupervisionConfig
from vision.errors import CheckpointError
from vision.models.architecture import RevCol
from vision.supervision.supervised import Supervised
from vision.weights.convert import convert, convert_file, skeleton
from vision.weights.files import Weights, read, select
from vision.weights.official_names import MismatchError, names_of, to_ours
from vision.weights.recognition import family, recognize, shape_in, spec_of

SIZES = {
    "revcol_tiny": Net(4, (64, 128, 256, 512), (2, 2, 4, 2)),
    "revcol_small": Net(8, (64, 128, 256, 512), (2, 2, 4, 2)),
    "revcol_base": Net(16, (72, 144, 288, 576), (1, 1, 3, 2)),
    "revcol_large": Net(8, (128, 256, 512, 1024), (1, 2, 6, 2)),
    "revcol_xlarge": Net(8, (224, 448, 896, 1792), (1, 2, 6, 2)),
    "revcol_huge": Net(8, (360, 720, 1440, 2880), (1, 2, 6, 2), huge=True),
    "test_revcol": TEST,
    "test_revcol_huge": TEST_HUGE,
}

SMALL = {
    "classes": TEST,
    "huge": TEST_HUGE,
    "supervised": replace(TEST, supervised=True),
    "supervised, 22K": replace(TEST, supervised=True, classes=1001),
    "kernel 7": replace(TEST, kernel=7),
}
small_nets = pytest.mark.parametrize("net", SMALL.values(), ids=list(SMALL))


def name_of(net: Net) -> str:
    return "test_revcol_huge" if net.huge else "test_revcol"


def with_edge_gains(state: official.State) -> official.State:
    """Some gains below the bound, of both signs."""
    state["subnet1.alpha0"][0, :3, 0, 0] = torch.tensor([1e-4, -1e-4, -5e-4])
    return state


def model_of(net: Net, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> RevCol:
    model = timm.create_model(name_of(net), num_classes=net.classes, kernel_size=net.kernel, dtype=dtype)
    model.load_state_dict(tensors)  # strict
    return model.eval()


# --------------------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize("classes", [1000, 21841])
@pytest.mark.parametrize(
    ("name", "supervised"),
    [
        (name, supervised)
        for name in SIZES
        for supervised in (False, True)
        if not supervised or name != "test_revcol_huge"
    ],
)
def test_every_name_and_shape_of_every_size(name: str, supervised: bool, classes: int) -> None:
    """The official code only supports heads on models of 4, 8, ... columns."""
    expected = official.shapes(replace(SIZES[name], classes=classes, supervised=supervised))
    model = RevCol(spec_of(name), classes, device="meta")
    if supervised:
        with torch.device("meta"):
            model = Supervised(model, SupervisionConfig())
    names = names_of(model)
    assert {pair.official: pair.official_shape for pair in names.pairs} | names.unused == expected
    assert len({pair.ours for pair in names.pairs}) == len(names.pairs)
    tensors = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    assert recognize(shape_in(tensors)) == name


def test_the_released_tiny_has_603_tensors() -> None:
    assert len(official.shapes(replace(SIZES["revcol_tiny"], classes=1000, supervised=True))) == 603


def test_family_is_all_that_the_official_code_has() -> None:
    assert set(family()) == set(SIZES)


# ------------------------------------------------------------------------------------------------------- the outputs


@torch.no_grad()
@small_nets
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_outputs_are_the_official_ones(net: Net, dtype: torch.dtype, tolerance: float, tmp_path) -> None:
    state = with_edge_gains(official.random_state(net, dtype=dtype))
    path = official.save_classification(tmp_path / "official.pth", state)
    done = convert_file(path, tmp_path / "ours.safetensors", heads=True)
    assert done.model == name_of(net)
    image = torch.randn(2, 3, 64, 96, dtype=dtype)
    logits, pixels, levels = official.forward(state, net, image)
    tensors = load_file(tmp_path / "ours.safetensors")
    heads = {key: tensor for key, tensor in tensors.items() if key.startswith(("classifiers.", "decoders."))}
    model = model_of(net, {key: tensor for key, tensor in tensors.items() if key not in heads}, dtype)
    near = {"atol": tolerance * logits[-1].abs().max().item(), "rtol": tolerance}
    assert_close(model(image), logits[-1], **near)
    for ours, theirs in zip(model.forward_intermediates(image, intermediates_only=True), levels, strict=True):
        assert_close(ours, theirs, atol=tolerance * theirs.abs().max().item(), rtol=tolerance)
    assert bool(heads) == net.supervised
    if net.supervised:
        supervised = Supervised(model, SupervisionConfig()).train()
        supervised.load_state_dict({f"model.{key}": value for key, value in model.state_dict().items()} | heads)
        outputs = supervised(image)
        assert list(outputs.pixels) == [0, 1, 2]
        for column in range(4):
            assert_close(outputs.logits[column], logits[column], **near)
        for column in range(3):
            scale = pixels[column].abs().max().item()
            assert_close(outputs.pixels[column], pixels[column], atol=tolerance * scale, rtol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("columns", [8, 12])
def test_heads_are_at_the_official_columns(columns: int) -> None:
    net = replace(TEST, columns=columns, supervised=True)
    state = official.random_state(net, dtype=torch.float64)
    model = timm.create_model("test_revcol", columns=columns, num_classes=11, dtype=torch.float64)
    supervised = Supervised(model, SupervisionConfig()).train()
    skeleton_, _ = skeleton(select(state), model.spec)
    ours = to_ours(state, names_of(skeleton_))
    names = model.state_dict().keys()
    supervised.load_state_dict({f"model.{key}" if key in names else key: ours[key] for key in ours})
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    logits, pixels, _ = official.forward(state, net, image)
    outputs = supervised(image)
    assert list(outputs.pixels) == [columns // 4 - 1, columns // 2 - 1, columns * 3 // 4 - 1]
    for found, expected in ((sorted(outputs.logits.items()), logits), (sorted(outputs.pixels.items()), pixels)):
        for (_, ours_), theirs in zip(found, expected, strict=True):
            assert_close(ours_, theirs, atol=1e-10 * theirs.abs().max().item(), rtol=1e-10)


@torch.no_grad()
def test_a_gain_of_zero_is_reported_and_converted_to_the_bound(tmp_path, capsys) -> None:
    state = official.random_state(TEST)
    state["subnet2.alpha1"][0, 5] = 0
    done = convert_file(official.save_classification(tmp_path / "official.pth", state), tmp_path / "ours.safetensors")
    assert done.zero_gains == 1
    assert "1 gains are exactly 0" in capsys.readouterr().out
    convert_file(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    back = read(tmp_path / "back.pth")["model"]
    assert back["subnet2.alpha1"][0, 5].item() == pytest.approx(1e-3)
    image = torch.randn(1, 3, 64, 64)
    assert_close(model_of(TEST, done.tensors)(image), official.forward(back, TEST, image)[0][-1], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ there and back


@small_nets
def test_values_are_converted_bit_for_bit(net: Net, tmp_path) -> None:
    state = with_edge_gains(official.random_state(net))
    source = official.save_classification(tmp_path / "official.pth", state)
    convert_file(source, tmp_path / "ours.safetensors", heads=True)
    convert_file(tmp_path / "ours.safetensors", tmp_path / "back.pth", heads=True)
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert set(back) == set(state)
    for key, tensor in state.items():
        if key.startswith("subnet0.alpha"):
            assert torch.equal(back[key], torch.full_like(tensor, 0.5))
        else:
            assert torch.equal(back[key], tensor), key


def test_without_heads_the_rest_is_a_plain_classifier(tmp_path, capsys) -> None:
    net = replace(TEST, supervised=True)
    source = official.save_classification(tmp_path / "official.pth", official.random_state(net))
    done = convert_file(source, tmp_path / "ours.safetensors")
    assert done.left_out == {
        "gains of the first column, which have no effect": 4,
        "intermediate supervision": 3 * 4 + 3 * (3 * (9 + 4) + 2),
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"test_revcol: {len(official.shapes(net))} tensors read"
    assert lines[1:3] == [f"omitted: {count} ({owner})" for owner, count in done.left_out.items()]
    assert lines[3].startswith(f"wrote {tmp_path / 'ours.safetensors'}: {len(done.tensors)} tensors, ")
    plain = timm.create_model("test_revcol", num_classes=11)
    assert set(done.tensors) == set(plain.state_dict())
    convert_file(tmp_path / "ours.safetensors", tmp_path / "back.pth")
    assert set(read(tmp_path / "back.pth")["model"]) == set(official.shapes(TEST))
    with_heads = convert(select(read(source)), heads=True)
    again = convert(Weights(with_heads.tensors, "ours"), "classification")
    assert set(again.tensors) == set(official.shapes(TEST))
    assert again.left_out == {"intermediate supervision": done.left_out["intermediate supervision"]}


def test_file_metadata(tmp_path) -> None:
    source = official.save_classification(tmp_path / "a.pth", official.random_state(replace(TEST, kernel=7)))
    done = convert_file(source, tmp_path / "ours.safetensors")
    assert done.options == {"num_classes": 11, "in_chans": 3, "kernel_size": 7}
    with safe_open(tmp_path / "ours.safetensors", "pt") as file:
        facts = file.metadata()
    assert facts == {
        "format": "pt",
        "model": "test_revcol",
        "weights": "raw",
        "num_classes": "11",
        "in_chans": "3",
        "kernel_size": "7",
    }
    timm.create_model(done.model, **done.options, checkpoint_path=str(tmp_path / "ours.safetensors"))


def test_raw_or_averaged(tmp_path) -> None:
    raw, ema = official.random_state(TEST), official.random_state(TEST, seed=1)
    path = official.save_classification(tmp_path / "official.pth", raw, ema)
    for weights, state in (("raw", raw), ("ema", ema)):
        done = convert_file(path, tmp_path / f"{weights}.safetensors", weights=weights)
        assert torch.equal(done.tensors["head.fc.weight"], state["cls.classifier.1.weight"])
    path = official.save_classification(tmp_path / "without.pth", raw)
    with raises_error(CheckpointError, code="missing-weights", source=path):
        convert_file(path, tmp_path / "x.safetensors", weights="ema")


def test_names_of_wrapped_models(tmp_path) -> None:
    state = official.random_state(TEST)
    torch.save({"model": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "ddp.pth")
    torch.save(state, tmp_path / "bare.pth")
    for name in ("ddp", "bare"):
        done = convert_file(tmp_path / f"{name}.pth", tmp_path / f"{name}.safetensors")
        assert torch.equal(done.tensors["stem.conv.weight"], state["stem.0.weight"])


def test_checkpoint_of_a_training_run(tmp_path) -> None:
    """With its average, and with heads at columns that the official code does not support."""
    models = [timm.create_model("test_revcol", num_classes=11) for _ in range(2)]
    heads = Supervised(models[0], SupervisionConfig(heads=2)).state_dict()
    heads = {key: tensor for key, tensor in heads.items() if not key.startswith("model.")}
    assert heads
    content = {"progress": {}, "model": models[0].state_dict(), "ema": models[1].state_dict(), "heads": heads}
    torch.save({**content, "heads_ema": heads}, tmp_path / "run.pt")
    image = torch.randn(1, 3, 64, 64)
    for model, weights in zip(models, ("raw", "ema"), strict=True):
        done = convert_file(tmp_path / "run.pt", tmp_path / f"{weights}.pth", weights=weights)
        assert done.left_out == {"intermediate supervision": len(heads)}
        state = read(tmp_path / f"{weights}.pth")["model"]
        assert_close(official.forward(state, TEST, image)[0][0], model.eval()(image), atol=1e-5, rtol=1e-5)
        done = convert_file(tmp_path / "run.pt", tmp_path / f"{weights}.safetensors", weights=weights)
        assert_close(load_file(tmp_path / f"{weights}.safetensors"), dict(model.state_dict()), atol=0, rtol=0)
    with raises_error(MismatchError, code="weights-mismatch", names="classifiers"):
        convert_file(tmp_path / "run.pt", tmp_path / "heads.pth", heads=True)


def test_isotropic_models_have_no_official_names(tmp_path) -> None:
    save_file(timm.create_model("test_revcol_vit").state_dict(), tmp_path / "vit.safetensors")
    with raises_error(CheckpointError, code="unknown-model", names="ConvNeXt"):
        convert_file(tmp_path / "vit.safetensors", tmp_path / "vit.pth")


def test_missing_average_of_the_official_trainer(tmp_path) -> None:
    """It would load whatever has the key of the average."""
    save_file(timm.create_model("test_revcol").state_dict(), tmp_path / "ours.safetensors")
    convert_file(tmp_path / "ours.safetensors", tmp_path / "official.pth")
    assert list(torch.load(tmp_path / "official.pth")) == ["model"]


# ------------------------------------------------------------------------------------------ detectors and segmenters

DETECTOR = {"neck.lateral_convs.0.conv.weight": (4, 8, 1, 1), "rpn_head.rpn_cls.bias": (3,), "roi_head.fc.bias": (2,)}
SEGMENTER = {"decode_head.conv_seg.bias": (150,), "auxiliary_head.conv_seg.bias": (150,)}


@torch.no_grad()
@pytest.mark.parametrize(("layout", "parts"), [("detection", DETECTOR), ("segmentation", SEGMENTER)])
@pytest.mark.parametrize("net", [TEST, TEST_HUGE], ids=["", "huge"])
def test_backbones(net: Net, layout: str, parts: dict, tmp_path) -> None:
    net = replace(net, headless=True)
    state = official.random_state(net)
    done = convert_file(official.save_openmmlab(tmp_path / "mm.pth", state, parts), tmp_path / "ours.safetensors")
    assert done.options["num_classes"] == 0
    assert {key for key in done.left_out if "gains" not in key} == {key.split(".")[0] for key in parts}
    overlay = {"file": str(tmp_path / "ours.safetensors")}
    model = timm.create_model(name_of(net), pretrained=True, features_only=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(1, 3, 64, 64)
    for ours, theirs in zip(model(image), official.forward(state, net, image)[2], strict=True):
        assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)
    convert_file(tmp_path / "ours.safetensors", tmp_path / "back.pth", layout=layout)
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert set(back) == {f"backbone.{key}" for key in state}
    assert all(torch.equal(back[f"backbone.{key}"], state[key]) for key in state if "subnet0.alpha" not in key)


def test_backbone_of_a_classifier(tmp_path) -> None:
    source = official.save_classification(tmp_path / "a.pth", official.random_state(replace(TEST, supervised=True)))
    convert_file(source, tmp_path / "ours.safetensors", heads=True)
    done = convert_file(tmp_path / "ours.safetensors", tmp_path / "mm.pth", layout="detection", heads=True)
    assert set(done.tensors) == set(official.shapes(replace(TEST, headless=True)))
    assert done.left_out["classifier"] == 4


def test_unknown_part_of_a_detector(tmp_path) -> None:
    path = official.save_openmmlab(
        tmp_path / "mm.pth", official.random_state(replace(TEST, headless=True)), {"mystery.weight": (3,)}
    )
    with pytest.raises(MismatchError) as caught:
        convert_file(path, tmp_path / "ours.safetensors")
    assert caught.value.problems == ("unexpected mystery.weight",)
    done = convert_file(path, tmp_path / "ours.safetensors", allow=["mystery.*"])
    assert done.left_out["mystery"] == 1
