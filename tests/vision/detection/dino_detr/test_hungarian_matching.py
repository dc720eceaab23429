"""Matching compared with an exhaustive search, and losses compared with their definitions."""

from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou

pytest.importorskip("scipy")

from vision.detection.dino_detr.deformable_transformer import ScoredBoxes
from vision.detection.dino_detr.hungarian_matching import Pairs, hungarian_pairs
from vision.detection.dino_detr.set_losses import positive_count, set_losses
from vision.detection.dino_detr.target_boxes import TargetBoxes

QUERIES, CLASSES = 5, 3
SIDES = torch.tensor([97.0, 61, 97, 61])


def predicted(images=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(images, QUERIES, 2, generator=generator) * 0.4 + 0.3
    sides = torch.rand(images, QUERIES, 2, generator=generator) * 0.3 + 0.05
    return ScoredBoxes(torch.randn(images, QUERIES, CLASSES, generator=generator), torch.cat([centers, sides], -1))


def objects(count, seed=1):
    boxes = predicted(seed=seed).boxes[0, :count]
    return TargetBoxes(boxes, torch.arange(count) % CLASSES, SIDES)


def corners(boxes):
    return box_convert(boxes, "cxcywh", "xyxy") * SIDES


def focal(logits, truth):
    p = logits.sigmoid()
    return torch.where(truth, -0.25 * (1 - p) ** 2 * F.logsigmoid(logits), -0.75 * p**2 * F.logsigmoid(-logits))


def costs(found, item):
    logits = found.scores[0]
    yes, no = focal(logits, torch.tensor(True)), focal(logits, torch.tensor(False))
    distance = (found.boxes[0][:, None] - item.boxes).abs().sum(-1)
    overlap = generalized_box_iou(corners(found.boxes[0]), corners(item.boxes))
    return 2 * (yes - no)[:, item.labels] + 5 * distance - 2 * overlap


def test_the_assignment_has_the_least_cost():
    found, item = predicted(), objects(3)
    cost = costs(found, item)
    pairs = hungarian_pairs(found, [item])[0]
    least = min(cost[list(rows), range(3)].sum() for rows in permutations(range(QUERIES), 3))
    assert len(set(pairs.queries.tolist())) == 3
    torch.testing.assert_close(cost[pairs.queries, pairs.objects].sum(), least)


def test_more_objects_than_queries_leave_some_unmatched():
    item = TargetBoxes(torch.rand(7, 4), torch.zeros(7, dtype=torch.long), SIDES)
    pairs = hungarian_pairs(predicted(), [item])[0]
    assert sorted(pairs.queries.tolist()) == list(range(QUERIES))
    assert len(set(pairs.objects.tolist())) == QUERIES


def test_nan_predictions_have_a_nan_loss():
    found = predicted()
    found = ScoredBoxes(found.scores, found.boxes * torch.nan)
    pairs = hungarian_pairs(found, [objects(2)])
    assert len(pairs[0].queries) == 2
    assert set_losses(found, [objects(2)], pairs)["loss_box"].isnan()


def test_losses_are_those_of_the_definition():
    found, items = predicted(images=2), [objects(2), objects(1, seed=3)]
    pairs = [Pairs(torch.tensor([4, 1]), torch.tensor([0, 1])), Pairs(torch.tensor([2]), torch.tensor([0]))]
    truth = torch.zeros(2, QUERIES, CLASSES, dtype=torch.bool)
    truth[0, 4, 0] = truth[0, 1, 1] = truth[1, 2, 0] = True
    chosen = torch.cat([found.boxes[0, [4, 1]], found.boxes[1, [2]]])
    wanted = torch.cat([items[0].boxes, items[1].boxes])
    expected = {
        "loss_class_0": focal(found.scores, truth).sum() / 3,
        "loss_box_0": 5 * (chosen - wanted).abs().sum() / 3,
        "loss_giou_0": 2 * (1 - generalized_box_iou(corners(chosen), corners(wanted)).diag()).sum() / 3,
    }
    torch.testing.assert_close(set_losses(found, items, pairs, "_0"), expected)


def test_boxes_without_an_area_have_finite_losses_and_gradients():
    boxes = torch.tensor([[[0.5, 0.5, 0, 0]] * QUERIES], requires_grad=True)
    found, item = ScoredBoxes(predicted().scores, boxes), TargetBoxes(boxes[0, :1].detach(), torch.tensor([1]), SIDES)
    losses = set_losses(found, [item], hungarian_pairs(found, [item]))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert boxes.grad.isfinite().all()


def test_without_pairs_the_count_is_one():
    assert positive_count([], torch.zeros(1)) == 1
