"""UperNet of mmsegmentation with the same weights; skipped where OpenMMLab is not installed.

pip install --no-deps mmdet==3.3.0 mmengine==0.10.7 mmcv-lite==2.1.0 mmsegmentation==1.2.2
pip install addict yapf terminaltables shapely termcolor opencv-python-headless prettytable ftfy regex
"""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("mmengine")
pytest.importorskip("mmseg")
pytest.importorskip("tests.support.mmcv_operators").install()

from tests.support.paths import ROOT  # noqa: E402
from vision.models.parameter_groups import parameter_groups  # noqa: E402
from vision.segmentation import upernet  # noqa: E402

CLASSES, CHANNELS, AUXILIARY = 7, 24, 12
DIMS = [8, 16, 32, 64]
BACKBONES = ("backbone.revcol.", "backbone.body.model.")
RENAMED = {  # ours begin so, theirs so
    BACKBONES[0]: BACKBONES[1],
    "decode_head.classifier.": "decode_head.conv_seg.",
    "auxiliary_head.classifier.": "auxiliary_head.conv_seg.",
}


@pytest.fixture(scope="module")
def snippet():
    page = (ROOT / "docs/guides/image-models.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.search(r"```py\n# openmmlab.py\n(.*?)```", page, flags=re.DOTALL)[1], names)
    return names


@pytest.fixture(scope="module")
def models(snippet):
    """Ours and theirs, with equal weights."""
    import mmseg.models  # registers them
    from mmseg.registry import MODELS

    assert mmseg.models.UPerHead.__name__ in MODELS
    assert MODELS.get("TimmFeatures") is snippet["TimmFeatures"]
    torch.manual_seed(0)
    loss = {"type": "CrossEntropyLoss", "avg_non_ignore": True}  # transformers averages over pixels that count
    head = {"num_classes": CLASSES, "dropout_ratio": 0.0, "norm_cfg": {"type": "BN"}, "align_corners": False}
    decode = {"type": "UPerHead", "in_channels": DIMS, "in_index": [0, 1, 2, 3], "pool_scales": (1, 2, 3, 6)}
    decode |= {"channels": CHANNELS, "loss_decode": loss}
    auxiliary = {"type": "FCNHead", "in_channels": DIMS[2], "in_index": 2, "channels": AUXILIARY, "num_convs": 1}
    auxiliary |= {"concat_input": False, "loss_decode": {**loss, "loss_weight": 0.4}}
    theirs = MODELS.build(
        {
            "type": "EncoderDecoder",
            "backbone": {"type": "TimmFeatures", "name": "test_revcol"},
            "decode_head": {**decode, **head},
            "auxiliary_head": {**auxiliary, **head},
            "test_cfg": {"mode": "whole"},
        }
    )
    ours = upernet("test_revcol", CLASSES, channels=CHANNELS, auxiliary_channels=AUXILIARY, dropout=0.0)
    given, state = theirs.state_dict(), {}
    for name in ours.state_dict():
        other = name.replace("batch_norm", "bn")
        for start, replacement in RENAMED.items():
            other = other.replace(start, replacement) if other.startswith(start) else other
        other = re.sub(r"(psp_modules\.\d+\.1)\.", r"\1.", other)
        state[name] = given.pop(other)
    assert not given
    ours.load_state_dict(state)
    return ours, theirs


def batch():
    torch.manual_seed(1)
    maps = torch.randint(0, CLASSES, (2, 67, 97))
    maps[0, :13] = 255
    return torch.randn(2, 3, 67, 97), maps


def test_logits_are_equal(models):
    ours, theirs = (model.eval() for model in models)
    images, _ = batch()
    with torch.no_grad():
        expected = torch.nn.functional.interpolate(theirs(images, mode="tensor"), images.shape[2:], mode="bilinear")
        torch.testing.assert_close(ours.semantic_logits(images), expected, rtol=1e-4, atol=1e-4)


def test_losses_are_equal(models):
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    ours, theirs = (model.train() for model in models)
    images, maps = batch()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=one[None])) for one in maps]
    losses = theirs(images, samples, mode="loss")
    expected = losses["decode.loss_ce"] + losses["aux.loss_ce"]
    found = ours.semantic_loss(images, maps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    starts = zip(BACKBONES, models, strict=True)
    own, other = (model.get_parameter(f"{start}stem.conv.weight") for start, model in starts)
    torch.testing.assert_close(
        torch.autograd.grad(found, own), torch.autograd.grad(expected, other), rtol=1e-3, atol=1e-6
    )


def test_the_constructor_of_the_page_gives_the_groups_of_the_trainer(models, snippet):
    _, theirs = models
    optimizer = {"type": "AdamW", "lr": 0.5, "weight_decay": 0.05}
    scales = {"layer_decay": 0.8, "backbone_lr_scale": 0.5}
    constructor = snippet["BackboneLayerDecay"]({"type": "OptimWrapper", "optimizer": optimizer}, scales)
    expected = parameter_groups(theirs, 0.05, **scales)
    found = constructor(theirs).optimizer.param_groups
    assert [group["lr"] for group in found] == [0.5 * group["lr_scale"] for group in expected]
    assert [group["weight_decay"] for group in found] == [group["weight_decay"] for group in expected]
    assert [list(map(id, group["params"])) for group in found] == [list(map(id, group["params"])) for group in expected]
