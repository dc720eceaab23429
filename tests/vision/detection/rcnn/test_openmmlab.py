"""Cascade Mask R-CNN and HTC against mmdetection with the same weights.

mmdetection needs a separate environment, see docs/development/openmmlab.md.
"""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("mmdet")

from tests.support import mmcv_operators
from tests.support.detection import CLASSES, SMALL, STUFF, detection_batch
from vision.detection import cascade_mask_rcnn, htc
from vision.detection.training_targets import padded_batch

FILES = {"cascade": "cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py", "htc": "htc/htc_r50_fpn_1x_coco.py"}
WIDTH, FC, MASK = SMALL["channels"], SMALL["width"], SMALL["mask_width"]
EVERY = {"type": "RandomSampler", "num": 10**6, "pos_fraction": 0.5}

NAMES = (
    ("backbone.fpn.inner_blocks.{}.0", "neck.lateral_convs.{}.conv", 4),
    ("backbone.fpn.layer_blocks.{}.0", "neck.fpn_convs.{}.conv", 4),
    ("rpn.head.conv.0.0", "rpn_head.rpn_conv", 0),
    ("rpn.head.cls_logits", "rpn_head.rpn_cls", 0),
    ("rpn.head.bbox_pred", "rpn_head.rpn_reg", 0),
    ("roi_heads.semantic.lateral.{}.0", "roi_head.semantic_head.lateral_convs.{}.conv", 5),
    ("roi_heads.semantic.convolutions.{}.0", "roi_head.semantic_head.convs.{}.conv", 4),
    ("roi_heads.semantic.embedding.0", "roi_head.semantic_head.conv_embedding.conv", 0),
    ("roi_heads.semantic.logits", "roi_head.semantic_head.conv_logits", 0),
)
STAGE_NAMES = (
    ("box_stages.{stage}.head.{}.0", "bbox_head.{stage}.shared_convs.{}.conv", 4),
    ("box_stages.{stage}.head.{}.1", "bbox_head.{stage}.shared_convs.{}.bn", 4),
    ("box_stages.{stage}.head.5", "bbox_head.{stage}.shared_fcs.0", 0),
    ("box_stages.{stage}.predictor.cls_score", "bbox_head.{stage}.fc_cls", 0),
    ("box_stages.{stage}.predictor.bbox_pred", "bbox_head.{stage}.fc_reg", 0),
    ("mask_heads.{stage}.convolutions.{}.0", "mask_head.{stage}.convs.{}.conv", 4),
    ("mask_heads.{stage}.predictor.conv5_mask", "mask_head.{stage}.upsample", 0),
    ("mask_heads.{stage}.predictor.mask_fcn_logits", "mask_head.{stage}.conv_logits", 0),
    ("mask_heads.{stage}.flow.0", "mask_head.{stage}.conv_res.conv", 0),
)


class Features(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, images):
        return tuple(self.body(images))

    def init_weights(self):
        pass


def module_names():
    """The pairs of names of modules, here and in mmdetection."""
    pairs = list(NAMES)
    for stage in range(3):
        for ours, theirs, count in STAGE_NAMES:
            ours, theirs = (text.replace("{stage}", str(stage)) for text in (ours, theirs))
            pairs.append((f"roi_heads.{ours}", f"roi_head.{theirs}", count))
    for ours, theirs, count in pairs:
        for index in range(count or 1):
            yield ours.format(index), theirs.format(index)


def translated(model):
    """The state of a model under the names of mmdetection, whose classes have no background in front."""
    state = {}
    modules = dict(model.named_modules())
    for ours, theirs in module_names():
        if ours not in modules:
            continue
        for key, value in modules[ours].state_dict().items():
            if ours.endswith("cls_score"):
                value = value.roll(-1, 0)
            elif ours.endswith("bbox_pred") and "box_stages" in ours:
                value = value[4:]
            elif ours.endswith("mask_fcn_logits"):
                value = value[1:]
            state[f"{theirs}.{key}"] = value
    return state


def ours(name):
    torch.manual_seed(0)
    build, options = (cascade_mask_rcnn, {}) if name == "cascade" else (htc, {"stuff_classes": STUFF})
    model = build("test_revcol", CLASSES, **SMALL, **options)
    for stage in model.roi_heads.box_stages:  # scores and refinements that differ from box to box
        nn.init.normal_(stage.predictor.cls_score.weight, std=1.0)
        nn.init.normal_(stage.predictor.bbox_pred.weight, std=0.3)
        stage.sampler.batch_size_per_image, stage.sampler.positive_fraction = EVERY["num"], EVERY["pos_fraction"]
    model.rpn.fg_bg_sampler.batch_size_per_image = EVERY["num"]
    return model


def theirs(name, model):
    mmcv_operators.install()
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim/configs" / FILES[name]).model
    config.backbone = {"type": "ResNet", "depth": 18}  # replaced below
    config.neck.update(in_channels=model.backbone.body.feature_info.channels(), out_channels=WIDTH)
    config.rpn_head.update(in_channels=WIDTH, feat_channels=WIDTH)
    heads = config.roi_head
    for extractor in ("bbox_roi_extractor", "mask_roi_extractor", "semantic_roi_extractor"):
        if extractor in heads:
            heads[extractor].out_channels = WIDTH
    for head in heads.bbox_head:
        head.update(type="ConvFCBBoxHead", num_shared_convs=4, num_shared_fcs=1, conv_out_channels=WIDTH)
        head.update(in_channels=WIDTH, fc_out_channels=FC, num_classes=CLASSES, norm_cfg={"type": "BN"})
        head.update(reg_class_agnostic=False, reg_decoded_bbox=True)
        head.loss_bbox = {"type": "GIoULoss", "loss_weight": 10.0}
    for head in heads.mask_head if isinstance(heads.mask_head, list) else [heads.mask_head]:
        head.update(in_channels=WIDTH, conv_out_channels=MASK, num_classes=CLASSES)
    if "semantic_head" in heads:
        heads.semantic_head.update(in_channels=WIDTH, conv_out_channels=WIDTH, num_classes=STUFF)
        config.test_cfg.rcnn.nms = {"type": "soft_nms", "iou_threshold": 0.5}
    config.train_cfg.rpn.sampler = {**EVERY, "add_gt_as_proposals": False}
    for stage in config.train_cfg.rcnn:
        stage.sampler = {**EVERY, "add_gt_as_proposals": True}
    other = MODELS.build(config)
    other.backbone = Features(model.backbone.body)
    wanted = {key for key in other.state_dict() if not key.startswith("backbone.")}
    state = translated(model)
    assert set(state) == wanted
    other.load_state_dict(state, strict=False)
    return other


def samples(targets, batch):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData, PixelData

    found = []
    height, width = batch.tensors.shape[-2:]
    for target, size in zip(targets, batch.image_sizes, strict=True):
        shapes = {"img_shape": size, "ori_shape": size, "pad_shape": (height, width)}
        sample = DetDataSample(metainfo={**shapes, "batch_input_shape": (height, width), "scale_factor": (1.0, 1.0)})
        sample.gt_instances = InstanceData(
            bboxes=target["boxes"], labels=target["labels"] - 1, masks=BitmapMasks(target["masks"].numpy(), *size)
        )
        padding = (0, width - size[1], 0, height - size[0])
        sample.gt_sem_seg = PixelData(sem_seg=F.pad(target["semantic_map"], padding, value=255)[None])
        found.append(sample)
    return found


@pytest.fixture(scope="module", params=["cascade", "htc"])
def pair(request):
    model = ours(request.param)
    return model, theirs(request.param, model)


def theirs_by_our_names(losses):
    found = {"loss_objectness": sum(losses["loss_rpn_cls"]), "loss_rpn_box_reg": sum(losses["loss_rpn_bbox"])}
    if "loss_semantic_seg" in losses:
        found["loss_semantic"] = losses["loss_semantic_seg"]
    for stage in range(3):
        for here, there in (("classifier", "cls"), ("box_reg", "bbox"), ("mask", "mask")):
            found[f"loss_{here}_{stage + 1}"] = losses[f"s{stage}.loss_{there}"].squeeze()
    return found


def both_losses(pair, dtype=torch.float32):
    model, other = (part.to(dtype).train() for part in pair)
    images, targets = detection_batch()
    images = [image.to(dtype) for image in images]
    targets = [{**target, "boxes": target["boxes"].to(dtype)} for target in targets]
    batch = padded_batch(images)
    return model(images, targets), theirs_by_our_names(other.loss(batch.tensors, samples(targets, batch)))


def test_losses_equal_those_of_mmdetection(pair):
    found, expected = both_losses(pair)
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def smooth(module):
    """Replace ReLUs, whose kinks turn rounding errors into different gradients."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.Softplus())
        else:
            smooth(child)


def test_gradients_equal_those_of_mmdetection(pair):
    model, other = copy.deepcopy(pair)
    smooth(model.roi_heads)
    smooth(other.roi_head)
    losses = both_losses((model, other), torch.float64)
    weights = dict(model.backbone.body.named_parameters())  # which both share
    gradients = [torch.autograd.grad(sum(part.values()), list(weights.values())) for part in losses]
    for name, here, there in zip(weights, *gradients, strict=True):
        assert (here - there).abs().max() <= 1e-5 * there.abs().max(), name


def test_detections_equal_those_of_mmdetection(pair):
    model, other = (part.eval() for part in pair)
    images, targets = detection_batch()
    batch = padded_batch(images)
    with torch.no_grad():
        found = model(images)
        expected = other.predict(batch.tensors, samples(targets, batch), rescale=False)
    for here, there in zip(found, expected, strict=True):
        there = there.pred_instances
        assert len(here["labels"]) > 10
        assert torch.equal(here["labels"] - 1, there.labels)
        torch.testing.assert_close(here["boxes"], there.bboxes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(here["scores"], there.scores, rtol=1e-4, atol=1e-4)
        assert torch.equal(here["masks"][:, 0] >= 0.5, there.masks)
