"""DINO with the weights of OpenMMLab's: the same losses and the same detections, where mmdet is installed.

mmdetection needs a separate environment, see docs/development/openmmlab.md.
"""

import re

import pytest
import timm
import torch

pytest.importorskip("mmdet")

from tests.support import mmcv_operators
from vision.detection import dino

CLASSES, QUERIES, LAYERS = 11, 17, 3
SIZES = [(128, 160), (96, 128)]
CHANNELS = [16, 32, 64]
NAMES = (
    (r"^neck\.convs\.(\d+)\.conv\.", r"projection.maps.\1.0."),
    (r"^neck\.convs\.(\d+)\.gn\.", r"projection.maps.\1.1."),
    (r"^neck\.extra_convs\.0\.conv\.", "projection.coarsest.0."),
    (r"^neck\.extra_convs\.0\.gn\.", "projection.coarsest.1."),
    (r"^level_embed$", "projection.level"),
    (r"^query_embedding\.", "contents."),
    (r"^memory_trans_fc\.", "proposals.project."),
    (r"^memory_trans_norm\.", "proposals.norm."),
    (rf"^bbox_head\.cls_branches\.{LAYERS}\.", "proposals.head.classes."),
    (rf"^bbox_head\.reg_branches\.{LAYERS}\.", "proposals.head.boxes."),
    (r"^bbox_head\.cls_branches\.(\d+)\.", r"detection_heads.\1.classes."),
    (r"^bbox_head\.reg_branches\.(\d+)\.", r"detection_heads.\1.boxes."),
    (r"^dn_query_generator\.label_embedding\.", "denoising.labels."),
    (r"^decoder\.ref_point_head\.layers\.0\.", "decoder.place.0."),
    (r"^decoder\.ref_point_head\.layers\.1\.", "decoder.place.2."),
    (r"\.self_attn\.attn\.", ".among_queries."),
    (r"\.(self_attn|cross_attn)\.", ".attention."),
    (r"\.sampling_offsets\.", ".offsets."),
    (r"\.attention_weights\.", ".weights."),
    (r"\.value_proj\.", ".value."),
    (r"\.output_proj\.", ".output."),
    (r"\.ffn\.layers\.0\.0\.", ".feedforward.0."),
    (r"\.ffn\.layers\.1\.", ".feedforward.2."),
    (r"^backbone\.body\.", "backbone."),
)
"""Names of OpenMMLab's parameters, and ours."""


def renamed(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def original():
    """OpenMMLab's detector on a small RevCol, with weights that are not those of its initialization."""
    mmcv_operators.install()
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    register_all_modules()

    class TimmLevels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.body = timm.create_model("test_revcol", features_only=True, out_indices=(1, 2, 3), memory="store")

        def forward(self, x):
            return tuple(self.body(x))

    MODELS.register_module(module=TimmLevels, force=True)
    torch.manual_seed(0)
    model = MODELS.build(configuration())
    model.init_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.02 if "offsets" in name else 0.05))
    return model


def configuration():
    attention = {"embed_dims": 256, "dropout": 0.0}
    deformable = {**attention, "num_levels": 4, "batch_first": True}
    feedforward = {"embed_dims": 256, "feedforward_channels": 64, "ffn_drop": 0.0}
    costs = [
        {"type": "FocalLossCost", "weight": 2.0},
        {"type": "BBoxL1Cost", "weight": 5.0, "box_format": "xywh"},
        {"type": "IoUCost", "iou_mode": "giou", "weight": 2.0},
    ]
    return {
        "type": "DINO",
        "num_queries": QUERIES,
        "with_box_refine": True,
        "as_two_stage": True,
        "data_preprocessor": {"type": "DetDataPreprocessor"},
        "backbone": {"type": "TimmLevels"},
        "neck": {
            "type": "ChannelMapper",
            "in_channels": CHANNELS,
            "kernel_size": 1,
            "out_channels": 256,
            "act_cfg": None,
            "norm_cfg": {"type": "GN", "num_groups": 32},
            "num_outs": 4,
        },
        "encoder": {"num_layers": 2, "layer_cfg": {"self_attn_cfg": deformable, "ffn_cfg": feedforward}},
        "decoder": {
            "num_layers": LAYERS,
            "return_intermediate": True,
            "layer_cfg": {
                "self_attn_cfg": {**attention, "num_heads": 8, "batch_first": True},
                "cross_attn_cfg": deformable,
                "ffn_cfg": feedforward,
            },
            "post_norm_cfg": None,
        },
        "positional_encoding": {"num_feats": 128, "normalize": True, "offset": 0.0, "temperature": 20},
        "bbox_head": {
            "type": "DINOHead",
            "num_classes": CLASSES,
            "sync_cls_avg_factor": True,
            "loss_cls": {"type": "FocalLoss", "use_sigmoid": True, "gamma": 2.0, "alpha": 0.25, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 5.0},
            "loss_iou": {"type": "GIoULoss", "loss_weight": 2.0},
        },
        "dn_cfg": {"label_noise_scale": 0.5, "box_noise_scale": 1.0, "group_cfg": {"num_dn_queries": 13}},
        "train_cfg": {"assigner": {"type": "HungarianAssigner", "match_costs": costs}},
        "test_cfg": {"max_per_img": 19},
    }


def ours(original, **options):
    model = dino(
        "test_revcol",
        CLASSES,
        memory="store",
        feedforward=64,
        encoder_layers=2,
        decoder_layers=LAYERS,
        queries=QUERIES,
        shared_heads=False,
        detections=19,
        **{"denoising": 13, **options},
    )
    state = {renamed(name): tensor for name, tensor in original.state_dict().items()}
    if model.denoising is None:
        del state["denoising.labels.weight"]
    model.load_state_dict(state)
    return model


def examples(sizes):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    boxes = [[[10.0, 10, 70, 60], [50, 30, 120, 90], [5, 53, 29, 83]], [[31.0, 7, 101, 89]]]
    labels = [[1, 11, 7], [3]]
    targets = [
        {"boxes": torch.tensor(box), "labels": torch.tensor(label)} for box, label in zip(boxes, labels, strict=True)
    ]
    return images, targets


def theirs(images, targets):
    """A batch and the samples of OpenMMLab."""
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    samples = []
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        size = tuple(image.shape[1:])
        batch[number, :, : size[0], : size[1]] = image
        sample = DetDataSample(
            metainfo={"img_shape": size, "batch_input_shape": (height, width), "scale_factor": (1.0, 1.0)}
        )
        sample.gt_instances = InstanceData(bboxes=target["boxes"], labels=target["labels"] - 1)
        samples.append(sample)
    return batch, samples


def their_losses(original, images, targets):
    """By our names."""
    batch, samples = theirs(images, targets)
    found = original.train()(batch, samples, mode="loss")
    kinds = {"cls": "class", "bbox": "box", "iou": "giou"}
    names = {}
    for name, loss in found.items():
        layer, part, kind = re.fullmatch(r"(?:d(\d+)\.)?(dn_|enc_)?loss_(\w+)", name).groups()
        part = {"dn_": "_denoising", "enc_": "_proposals", None: ""}[part]
        names[f"loss_{kinds[kind]}{part}" + (f"_{layer}" if layer else "")] = loss.squeeze()
    return names


@pytest.fixture
def same_noise(monkeypatch):
    """The same shift for every corner, and a wrong label for every copy."""
    monkeypatch.setattr(torch, "rand_like", lambda x, **options: torch.full_like(x, 0.2, **options))
    monkeypatch.setattr(torch, "randint_like", lambda x, *args, **options: torch.ones_like(x))


def test_losses_and_gradients_are_equal(original, same_noise):
    model, (images, targets) = ours(original).train(), examples([SIZES[0]] * 2)
    found, expected = model(images, targets), their_losses(original, images, targets)
    assert len(expected) == 3 * (2 * LAYERS + 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    sum(found.values()).backward()
    original.zero_grad()
    sum(expected.values()).backward()
    theirs_by_name = {renamed(name): parameter.grad for name, parameter in original.named_parameters()}
    for name, parameter in model.named_parameters():
        scale = theirs_by_name[name].abs().max().clamp(min=1)
        torch.testing.assert_close(parameter.grad / scale, theirs_by_name[name] / scale, rtol=1e-3, atol=1e-4, msg=name)


def test_losses_without_denoising_are_equal(original):
    model, (images, targets) = ours(original, denoising=0).train(), examples([SIZES[0]] * 2)
    expected = their_losses(original, images, targets)
    expected = {name: loss for name, loss in expected.items() if "denoising" not in name}
    torch.testing.assert_close(model(images, targets), expected, rtol=1e-4, atol=1e-4)


def test_losses_of_padded_images_are_equal(original, same_noise, monkeypatch):
    """Except for the encoding of queries: OpenMMLab encodes boxes as fractions of the padded batch."""
    from mmdet.models.layers.transformer import dino_layers

    model, (images, targets) = ours(original).train(), examples(SIZES)
    shown = (torch.tensor(SIZES) / torch.tensor(SIZES[0])).flip(-1).repeat(1, 2)[:, None]
    encode = dino_layers.coordinate_to_encoding
    monkeypatch.setattr(dino_layers, "coordinate_to_encoding", lambda boxes: encode(boxes / shown))
    expected = their_losses(original, images, targets)
    torch.testing.assert_close(model(images, targets), expected, rtol=1e-4, atol=1e-4)


def test_detections_are_equal(original):
    model, (images, targets) = ours(original).eval(), examples([SIZES[0]] * 2)
    batch, samples = theirs(images, targets)
    with torch.no_grad():
        found = model(images)
        expected = original.eval()(batch, samples, mode="predict")
    for ours_, sample in zip(found, expected, strict=True):
        instances = sample.pred_instances
        assert torch.equal(ours_["labels"], instances.labels + 1)
        torch.testing.assert_close(ours_["scores"], instances.scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours_["boxes"], instances.bboxes, rtol=1e-4, atol=1e-4)
