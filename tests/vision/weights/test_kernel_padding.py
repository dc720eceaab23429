"""Kernel padding: a model with larger kernels around the trained ones has the same outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

from tests.support import official_reference as official
from tests.support.errors import raises_error
from tests.support.official_reference import TEST
from tests.support.training_runs import tiny
from vision.config.run import load_config
from vision.data.dataset import load_data
from vision.errors import CheckpointError
from vision.training.train_state import TrainState
from vision.weights.files import read
from vision.weights.kernel_padding import STD, padded
from vision.weights.official_names import MismatchError


@pytest.mark.parametrize(("size", "target"), [(3, 7), (3, 13), (1, 3), (5, 5)])
def test_the_center_is_bit_identical_and_surrounded_by_noise(size, target):
    weight = torch.randn(400, 1, size, size)
    result = padded(weight, target)
    margin = (target - size) // 2
    inner = slice(margin, margin + size)
    assert result.shape == (400, 1, target, target)
    assert torch.equal(result[..., inner, inner], weight)
    around = torch.ones(target, target, dtype=torch.bool)
    around[inner, inner] = False
    noise = result[..., around] / STD
    assert noise.shape[-1] == target**2 - size**2
    if target > size:
        assert noise.std().item() == pytest.approx(1, abs=0.05)
        assert abs(noise.mean().item()) < 0.05
        assert (noise != 0).all()


@pytest.mark.parametrize(("size", "target"), [(7, 3), (3, 4)])
def test_kernels_that_cannot_be_centered(size, target):
    with raises_error(ValueError, code="shape-mismatch", key="size", names=[f"kernel of {size}", f"of {target}"]):
        padded(torch.zeros(2, 1, size, size), target)


@pytest.fixture
def released(tmp_path) -> tuple[Path, official.State]:
    state = official.random_state(TEST)
    return official.save_classification(tmp_path / "official.pth", state), state


@pytest.mark.parametrize("kernel_size", [7, 13])
def test_outputs_are_those_of_the_small_kernels(released, kernel_size):
    """Against the official forward with kernels of 3; and the new values around them are trained."""
    path, state = released
    overlay = {"file": str(path), "num_classes": 11}
    options = {"kernel_size": kernel_size, "pretrained_cfg_overlay": overlay}
    model = timm.create_model("test_revcol", pretrained=True, **options)
    image = torch.randn(2, 3, 96, 96)
    expected = official.forward(state, TEST, image)[0][0]
    output = model(image)
    assert_close(output, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if "blocks" in name and name.endswith("dwconv.weight"):
            assert parameter.shape[-1] == kernel_size
            level = int(name.split(".")[3])
            if level < 2:  # above, states are too small for the corner of a kernel to see anything
                assert (parameter.grad[..., 0, 0] != 0).all(), name


def test_a_run_starts_from_padded_kernels(tmp_path):
    """By `model.kernel_size`; two runs of one seed have the same noise."""
    state = official.random_state(official.Net(4, (8, 16, 32, 64), (1, 1, 2, 1)))
    path = official.save_classification(tmp_path / "official.pth", state)
    data = load_data(load_config(tiny(tmp_path, data={"name": "digits", "img_size": 32})).data, seed=0)
    model = {"timm": "test_revcol", "kernel_size": 7}
    config = load_config(tiny(tmp_path, model=model, pretrained={"source": str(path)}, ema=None, mixup=None))
    engines = [TrainState(config, data, 5) for _ in range(2)]
    assert "kernels of 3 padded to 7" in engines[0].beginning
    found, again = (
        engine.model.state_dict()["columns.cells.1.2.function.blocks.1.dwconv.weight"] for engine in engines
    )
    assert torch.equal(found[..., 2:5, 2:5], state["subnet1.level2.blocks.1.dwconv.weight"])
    assert 0 < found[..., 0, :].abs().max() < 1e-6
    assert torch.equal(found, again)
    smaller = load_config(tiny(tmp_path, model={**model, "kernel_size": 1}, pretrained={"source": str(path)}))
    with raises_error(CheckpointError, code="weights-mismatch", names=["test_revcol", "3, 3), not", "1, 1)"]):
        TrainState(smaller, data, 5)


def test_larger_kernels_than_the_models_are_refused_by_timm_as_well(released, tmp_path):
    path, _ = released
    large = timm.create_model("test_revcol", num_classes=11, kernel_size=5)
    torch.save(large.state_dict(), tmp_path / "large.pth")
    assert read(tmp_path / "large.pth")
    overlay = {"file": str(tmp_path / "large.pth"), "num_classes": 11}
    with raises_error(MismatchError, code="weights-mismatch", names="misshapen"):
        timm.create_model("test_revcol", pretrained=True, num_classes=11, pretrained_cfg_overlay=overlay)
    assert path.exists()
