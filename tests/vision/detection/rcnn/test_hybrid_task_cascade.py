"""The components that HTC adds to a cascade."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("torchvision")

from tests.support.detection import CLASSES, SMALL, STUFF, detection_batch
from vision.detection import htc
from vision.detection.rcnn.hybrid_task_cascade import HybridTaskHeads, semantic_loss
from vision.detection.training_targets import checked_targets, semantic_maps

BOXES = [torch.tensor([[5.0, 7.0, 31.0, 41.0], [11.0, 3.0, 53.0, 47.0]])]


def heads(**options):
    torch.manual_seed(0)
    return HybridTaskHeads(SMALL["channels"], CLASSES, width=SMALL["width"], mask_width=SMALL["mask_width"], **options)


def levels():
    generator = torch.Generator().manual_seed(3)
    sizes = [64 // stride for stride in (4, 8, 16, 32, 64)]
    return [torch.randn(1, SMALL["channels"], size, size, generator=generator) for size in sizes]


def test_mask_heads_see_the_features_of_the_heads_before():
    model = heads()
    before = [model.mask_logits(index, levels(), BOXES, None) for index in range(3)]
    torch.nn.init.zeros_(model.mask_heads[0].convolutions[3][0].weight)
    after = [model.mask_logits(index, levels(), BOXES, None) for index in range(3)]
    assert not any(torch.equal(first, second) for first, second in zip(before, after, strict=True))


def test_masks_of_detections_are_those_of_the_last_stage():
    model = heads()
    labels = torch.tensor([2, 3])
    found = model.mask_probabilities(levels(), BOXES, labels, None)
    logits = model.mask_logits(2, levels(), BOXES, None)
    torch.testing.assert_close(found, torch.stack([logits[0, 2], logits[1, 3]]).sigmoid())


def test_mask_heads_train_on_refined_boxes():
    torch.manual_seed(0)
    model = htc("test_revcol", CLASSES, **SMALL).train()
    sampled = []
    for stage in model.roi_heads.box_stages:
        sample = stage.sample
        stage.sample = lambda *args, sample=sample: sampled.append(args[0]) or sample(*args)
    model(*detection_batch())
    assert len(sampled) == 6  # boxes and masks of three stages
    for index in (1, 3):
        assert sampled[index] is sampled[index + 1]  # the next stage starts from what the masks were sampled from


def test_boxes_and_masks_see_the_semantic_embedding():
    torch.manual_seed(0)
    model = htc("test_revcol", CLASSES, STUFF, **SMALL).train()
    losses = model(*detection_batch())
    for name in ("loss_box_reg_1", "loss_classifier_3", "loss_mask_2"):
        (gradient,) = torch.autograd.grad(losses[name], model.roi_heads.semantic.embedding[0].weight, retain_graph=True)
        assert gradient.abs().sum() > 0


def test_semantic_maps_are_those_of_the_pixels_at_the_stride():
    images, targets = detection_batch()
    maps = semantic_maps(checked_targets(images, targets, CLASSES), STUFF, (8, 12), 8)
    whole = targets[0]["semantic_map"]
    assert maps.shape == (2, 8, 12)
    assert [maps[0, row, column] for row, column in ((0, 0), (7, 11))] == [whole[0, 0], whole[56, 88]]
    assert (maps[1, :, 9:] == 255).all()
    assert (maps[1, :, :9] != 255).all()


def test_pixels_without_a_class_count_in_the_mean_only():
    logits = torch.randn(2, 5, 3, 7, generator=torch.Generator().manual_seed(0))
    maps = torch.randint(0, 5, (2, 3, 7), generator=torch.Generator().manual_seed(1))
    maps[0] = 255
    expected = F.cross_entropy(logits[1:], maps[1:]) / 2
    torch.testing.assert_close(semantic_loss(logits, maps), expected)
    assert semantic_loss(logits, torch.full_like(maps, 255)) == 0
