"""Names that do not fit are listed, in official files, in ours and in other files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.support import official_reference as official
from tests.support.errors import raises_error
from tests.support.official_reference import TEST
from vision.errors import CheckpointError
from vision.weights.convert import convert, convert_file, skeleton
from vision.weights.files import select
from vision.weights.official_names import MismatchError
from vision.weights.recognition import spec_of


def test_each_name_that_does_not_fit_is_listed(tmp_path, capsys) -> None:
    state = official.random_state(TEST)
    del state["subnet2.level1.fusion.up.channel_reschedule.1.bias"], state["cls.classifier.0.weight"]
    state["subnet1.level0.blocks.0.pwconv1.weight"] = torch.ones(31, 8)
    state["subnet0.alpha3"] = torch.ones(64)
    state["ema_something"] = torch.ones(2)
    path = official.save_classification(tmp_path / "a.pth", state)
    problems = {
        "missing subnet2.level1.fusion.up.channel_reschedule.1.bias",
        "missing cls.classifier.0.weight",
        "misshapen subnet1.level0.blocks.0.pwconv1.weight: (31, 8), not (32, 8)",
        "misshapen subnet0.alpha3: (64,), not (1, 64, 1, 1)",
        "unexpected ema_something",
    }
    with raises_error(MismatchError, code="weights-mismatch", source=path, names=["test_revcol", "2 more"]) as caught:
        convert_file(path, tmp_path / "ours.safetensors")
    assert set(caught.value.problems) == problems
    assert set(capsys.readouterr().err.splitlines()) == problems
    assert not (tmp_path / "ours.safetensors").exists()
    allow = ["subnet2.level1.fusion.up.*", "cls.classifier.0.weight", "subnet1*pwconv1.weight", "subnet0.alpha3"]
    with pytest.raises(MismatchError) as caught:
        convert_file(path, tmp_path / "ours.safetensors", allow=allow)
    assert caught.value.problems == ("unexpected ema_something",)
    done = convert_file(path, tmp_path / "ours.safetensors", allow=[*allow, "ema_*"])
    absent = set(timm.create_model("test_revcol").state_dict()) - set(done.tensors)
    assert absent == {
        "columns.cells.2.1.function.fusion.paths.1.proj.norm.bias",
        "columns.cells.1.0.function.blocks.0.mlp.fc1.weight",
        "head.norm.weight",
    }
    assert done.left_out["unknown, but allowed"] == done.left_out["misshapen, but allowed"] == 1


def test_each_name_of_ours_that_does_not_fit_is_listed(tmp_path) -> None:
    state = timm.create_model("test_revcol", num_classes=11).state_dict()
    del state["columns.cells.3.3.gain.weight"]
    state["head.norm.weight"], state["more"] = torch.ones(3), torch.ones(1)
    save_file(state, tmp_path / "ours.safetensors")
    with pytest.raises(MismatchError) as caught:
        convert_file(tmp_path / "ours.safetensors", tmp_path / "official.pth")
    assert set(caught.value.problems) == {
        "missing columns.cells.3.3.gain.weight",
        "misshapen head.norm.weight: (3,), not (64,)",
        "unexpected more",
    }
    allow = ["columns.cells.3.3.gain.weight", "head.norm.weight", "more"]
    done = convert_file(tmp_path / "ours.safetensors", tmp_path / "official.pth", allow=allow)
    assert set(official.shapes(TEST)) - set(done.tensors) == {"subnet3.alpha3", "cls.classifier.0.weight"}


def test_incomplete_decoder() -> None:
    state = official.random_state(replace(TEST, supervised=True))
    del state["decoder_blocks.1.normal_layers.2.0.gamma"]
    with pytest.raises(MismatchError) as caught:
        convert(select(state))
    assert caught.value.problems == ("missing decoder_blocks.1.normal_layers.2.0.gamma",)


def test_unknown_shape_needs_a_model(tmp_path) -> None:
    path = official.save_classification(tmp_path / "a.pth", official.random_state(replace(TEST, columns=5)))
    with raises_error(CheckpointError, code="unknown-model", source=path, names=["5 columns", "(8, 16, 32, 64)"]):
        convert_file(path, tmp_path / "ours.safetensors")
    with raises_error(MismatchError, code="weights-mismatch", source=path, names="unexpected subnet4"):
        convert_file(path, tmp_path / "ours.safetensors", model="test_revcol")
    with raises_error(
        MismatchError, code="weights-mismatch", source=path, names=["revcol_tiny", "misshapen stem.0.weight"]
    ):
        convert_file(path, tmp_path / "ours.safetensors", model="revcol_tiny")
    with raises_error(code="unknown-choice", key="--model", names=["'revcol_vit_base'", "revcol_base, "]):
        convert_file(path, tmp_path / "ours.safetensors", model="revcol_vit_base")


@pytest.mark.parametrize(
    ("content", "code", "names"),
    [
        ([1, 2], "wrong-format", "dict"),
        ({"model": 3}, "wrong-format", "dict"),
        ({"model": {"subnet0.alpha0": "text"}}, "wrong-format", "'subnet0.alpha0'"),
        ({"fc.weight": torch.ones(2)}, "missing-weights", ()),
        ({}, "missing-weights", ()),
        ({"model": {"subnet0.alpha0": torch.ones(1)}}, "unknown-model", "ConvNeXt"),
    ],
)
def test_other_files_are_refused(content, code: str, names, tmp_path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with raises_error(CheckpointError, code=code, source=tmp_path / "a.pth", names=names):
        convert_file(tmp_path / "a.pth", tmp_path / "ours.safetensors")


def test_skeleton_has_no_values() -> None:
    net, options = skeleton(select(official.random_state(TEST)), spec_of("test_revcol"))
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"meta"}
    assert options == {"num_classes": 11, "in_chans": 3}
