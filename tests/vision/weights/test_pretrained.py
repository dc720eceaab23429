"""`pretrained=True` loads official files and ours, as for other timm models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch.testing import assert_close

from tests.support import official_reference as official
from tests.support.errors import raises_error
from tests.support.official_reference import TEST, Net
from tests.support.paths import ROOT
from vision.revcol import HUGE, RELEASE
from vision.weights.convert import convert_file
from vision.weights.official_names import MismatchError


@pytest.fixture(params=["supervised", "plain"])
def checkpoint(request, tmp_path) -> tuple[Path, Net, official.State]:
    net = replace(TEST, supervised=request.param == "supervised")
    state = official.random_state(net)
    return official.save_classification(tmp_path / "official.pth", state, official.random_state(net, 1)), net, state


def logits(state: official.State, net: Net, image: torch.Tensor) -> torch.Tensor:
    return official.forward(state, net, image)[0][-1]


@torch.no_grad()
def test_pretrained_from_a_file(checkpoint) -> None:
    """The raw weights, which the published accuracies are of."""
    path, net, state = checkpoint
    overlay = {"file": str(path), "num_classes": 11}
    model = timm.create_model("test_revcol", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pretrained_from_a_url(checkpoint, tmp_path) -> None:
    """What timm has downloaded before is in its cache, under the last part of the URL."""
    path, net, state = checkpoint
    overlay = {"url": RELEASE + path.name, "num_classes": 11}
    model = timm.create_model("test_revcol", True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path).eval()
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pretrained_is_adapted_as_timm_does(checkpoint) -> None:
    path, net, state = checkpoint
    overlay = {"file": str(path), "num_classes": 11}
    image = torch.randn(2, 1, 64, 64)
    model = timm.create_model("test_revcol", True, in_chans=1, num_classes=3, pretrained_cfg_overlay=overlay).eval()
    assert model(image).shape == (2, 3)
    _, _, levels = official.forward(state, net, image.expand(-1, 3, -1, -1))  # one channel gets the sum of the kernels
    assert_close(model.forward_features(image), levels[-1], atol=1e-5 * levels[-1].abs().max().item(), rtol=1e-5)
    features = timm.create_model("test_revcol", True, features_only=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(2, 3, 64, 64)
    for ours, theirs in zip(features(image), official.forward(state, net, image)[2], strict=True):
        assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=1e-5)


@torch.no_grad()
def test_pretrained_from_ours(checkpoint, tmp_path) -> None:
    path, net, state = checkpoint
    convert_file(path, tmp_path / "ours.safetensors", heads=True)
    overlay = {"file": str(tmp_path / "ours.safetensors"), "num_classes": 11}
    model = timm.create_model("test_revcol", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pretrained_from_a_state_dict(checkpoint) -> None:
    _, net, state = checkpoint
    overlay = {"state_dict": dict(state), "num_classes": 11}
    model = timm.create_model("test_revcol", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    image = torch.randn(2, 3, 64, 64)
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_file_determines_classes_and_channels(checkpoint, tmp_path) -> None:
    """A classifier with the model's number of classes is kept, although `pretrained_cfg` has 1000 classes."""
    path, net, state = checkpoint
    image = torch.randn(2, 3, 64, 64)
    model = timm.create_model("test_revcol", True, num_classes=11, pretrained_cfg_overlay={"file": str(path)}).eval()
    assert_close(model(image), logits(state, net, image), atol=1e-5, rtol=1e-5)

    gray = timm.create_model("test_revcol", in_chans=1, num_classes=11).eval()
    torch.save(gray.state_dict(), tmp_path / "gray.pt")
    overlay = {"file": str(tmp_path / "gray.pt")}
    again = timm.create_model("test_revcol", True, in_chans=1, num_classes=11, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(again(image[:, :1]), gray(image[:, :1]))
    color = timm.create_model("test_revcol", True, features_only=True, pretrained_cfg_overlay=overlay).eval()
    expected = gray.forward_features(image[:, :1])  # every channel gets a third of the kernel
    assert_close(color(image[:, :1].expand(-1, 3, -1, -1))[-1], expected, atol=1e-4, rtol=1e-4)


def test_pretrained_of_another_model_is_refused(checkpoint) -> None:
    """Also with another number of classes, where timm itself would load what fits."""
    path, _, _ = checkpoint
    for overlay in ({"file": str(path), "num_classes": 11}, {"file": str(path)}):
        with raises_error(MismatchError, code="weights-mismatch", source=path, names=["test_revcol_huge", " subnet"]):
            timm.create_model("test_revcol_huge", True, num_classes=5, pretrained_cfg_overlay=overlay)
    with raises_error(MismatchError, code="weights-mismatch", names=["test_revcol", "unexpected subnet3"]):
        timm.create_model("test_revcol", True, columns=3, pretrained_cfg_overlay={"file": str(path), "num_classes": 11})


RELEASED = {
    "revcol_tiny": "revcol_tiny_1k.pth",
    "revcol_small": "revcol_small_1k.pth",
    "revcol_base": "revcol_base_1k.pth",
    "revcol_base.in22k": "revcol_base_22k.pth",
    "revcol_base.in22k_ft_in1k": "revcol_base_22k_1kft_224.pth",
    "revcol_base.in22k_ft_in1k_384": "revcol_base_22k_1kft_384.pth",
    "revcol_large": "revcol_large_22k_1kft_224.pth",
    "revcol_large.in22k": "revcol_large_22k.pth",
    "revcol_large.in22k_ft_in1k_384": "revcol_large_22k_1kft_384.pth",
}


@pytest.mark.parametrize("name", [*RELEASED, "revcol_huge"])
def test_released_urls(name: str) -> None:
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg is not None
    assert cfg.url == (HUGE if name == "revcol_huge" else RELEASE + RELEASED[name])
    assert cfg.num_classes == (21841 if name.endswith("22k") else 1000)
    size = 384 if name.endswith("384") else 640 if name == "revcol_huge" else 224
    assert cfg.input_size == (3, size, size)
    assert (cfg.crop_pct, cfg.crop_mode) == ((0.875, "center") if size == 224 else (1.0, "squash"))
    assert timm.is_model_pretrained(name)


def test_page_lists_the_releases() -> None:
    page = (ROOT / "docs/guides/pretrained-weights.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `revcol")
    ]
    listed = {name.strip("`"): (file, int(classes), int(size)) for name, file, classes, size, _ in rows}
    cfgs = {name: timm.models.get_pretrained_cfg(name) for name in timm.list_pretrained("revcol_*")}
    found = {
        name: (cfg.url.split("/")[-1], cfg.num_classes, cfg.input_size[1])
        for name, cfg in cfgs.items()
        if cfg is not None
    }
    assert listed == found


def test_a_model_without_a_release_is_reported() -> None:
    assert not timm.is_model_pretrained("revcol_xlarge")
    with pytest.raises(RuntimeError, match="No pretrained weights exist for test_revcol"):
        timm.create_model("test_revcol", pretrained=True)


@torch.no_grad()
def test_revcol_tiny_itself(tmp_path) -> None:
    """`create_model` by name, with the file that timm would have downloaded."""
    net = Net(4, (64, 128, 256, 512), (2, 2, 4, 2), classes=1000, supervised=True)
    state = official.random_state(net)
    official.save_classification(tmp_path / "revcol_tiny_1k.pth", state)
    model = timm.create_model("revcol_tiny", pretrained=True, cache_dir=tmp_path).eval()
    image = torch.randn(1, 3, 64, 64)
    expected = logits(state, net, image)
    assert_close(model(image), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
