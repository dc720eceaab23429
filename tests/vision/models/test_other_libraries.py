"""Detectors and segmenters of other libraries on a RevCol, as docs/guides/image-models.md builds them."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torchvision.models import detection

from revnets import ReversibleColumns
from tests.support.errors import raises_error
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/guides/image-models.md").read_text(encoding="utf-8")
OPTIONS = {
    "MaskRCNN": {"box_detections_per_img": 5, "rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 20},
    "RetinaNet": {},
    "FCOS": {},
}


def snippet(file):
    """Return the names that a code block of the page defines."""
    names: dict = {}
    exec(re.search(rf"```py\n# {file}\n(.*?)```", PAGE, flags=re.DOTALL)[1], names)
    return names


def gradients(model, step):
    """Return the gradients of all parameters for each memory mode; `step` computes the loss."""
    columns = next(module for module in model.modules() if isinstance(module, ReversibleColumns))
    found = []
    for memory in ("store", "exact"):
        columns.memory = memory
        model.zero_grad()
        torch.manual_seed(1)
        step(model).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    return found


def assert_equal(store, exact):
    assert all(gradient is not None for gradient in store.values())
    assert [name for name in store if not torch.equal(store[name], exact[name])] == []


@pytest.mark.parametrize("kind", OPTIONS)
def test_detectors_of_torchvision(kind):
    torch.manual_seed(0)
    backbone = snippet("pyramid.py")["TimmFPN"]("test_revcol", out_channels=32)
    sizes = {"min_size": 97, "max_size": 131, **OPTIONS[kind]}
    if kind != "MaskRCNN":  # whose anchors are for three levels of a backbone and two more
        scales = (4,) if kind == "FCOS" else (4, 5, 7)
        anchors = detection.anchor_utils.AnchorGenerator((scales,) * 5, ((1.0,),) * 5)
        sizes["anchor_generator"] = anchors
    model = getattr(detection, kind)(backbone, num_classes=3, **sizes).train()
    masks = torch.zeros(1, 97, 113)
    masks[:, 11:59, 13:71] = 1
    target = {"boxes": torch.tensor([[13.0, 11, 71, 59]]), "labels": torch.tensor([2]), "masks": masks}
    images = [torch.rand(3, 97, 113)]
    assert_equal(*gradients(model, lambda model: sum(model(images, [target]).values())))


@pytest.mark.parametrize(
    ("kind", "options"), [("UPerNet", {}), ("Unet", {}), ("FPN", {}), ("PAN", {"encoder_output_stride": 32})]
)
def test_segmenters_of_smp(kind, options):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = getattr(smp, kind)("tu-test_revcol", encoder_weights=None, classes=5, **options).train()
    images = torch.randn(2, 3, 256, 256) if kind == "PAN" else torch.randn(2, 3, 96, 64)
    assert_equal(*gradients(model, lambda model: model(images).square().mean()))


def test_a_decoder_with_dilated_levels_is_refused_with_the_reason():
    smp = pytest.importorskip("segmentation_models_pytorch")
    with raises_error(code="invalid-value", key="output_stride", names=["16", "dilated", "32"]):
        smp.DeepLabV3Plus("tu-test_revcol", encoder_weights=None, classes=5)


@pytest.mark.parametrize("options", [{}, {"features_only": True}])
def test_the_stride_of_the_coarsest_level_is_accepted(options):
    assert timm.create_model("test_revcol", output_stride=32, **options) is not None
    with raises_error(code="invalid-value", key="output_stride", source="test_revcol", names="32"):
        timm.create_model("test_revcol", output_stride=8, **options)


def test_the_stride_of_an_isotropic_model_is_that_of_its_patches():
    patch = timm.create_model("test_revcol_vit").feature_info[-1]["reduction"]
    assert timm.create_model("test_revcol_vit", output_stride=patch) is not None
    with raises_error(code="invalid-value", key="output_stride", names=str(patch)):
        timm.create_model("test_revcol_vit", output_stride=2 * patch)
