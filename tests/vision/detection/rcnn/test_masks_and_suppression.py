"""Pooled features, masks in their boxes, and suppression of detections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torchvision")

from torchvision.ops import box_iou

from vision.detection.rcnn.box_heads import SampledBoxes
from vision.detection.rcnn.mask_heads import mask_goals, mask_loss, pasted_masks
from vision.detection.rcnn.roi_pooling import RoIPool
from vision.detection.rcnn.suppression import best_detections, soft_nms


def rectangle(box, size):
    left, top, right, bottom = box
    mask = torch.zeros(size)
    mask[top:bottom, left:right] = 1
    return mask


@settings(max_examples=31, deadline=None)
@given(left=st.integers(-3, 12), top=st.integers(-3, 12), seed=st.integers(0, 2**32 - 1))
def test_a_mask_in_a_box_of_its_size_is_copied_and_cut_off_at_the_border(left, top, seed):
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(seed))
    pasted = pasted_masks(mask[None], torch.tensor([[left, top, left + 5, top + 5]]).float(), (11, 13))
    canvas = torch.zeros(23, 23)
    canvas[top + 3 : top + 8, left + 3 : left + 8] = mask
    torch.testing.assert_close(pasted[0, 0], canvas[3:14, 3:16])


def test_a_mask_in_a_box_of_no_area_is_empty():
    assert not pasted_masks(torch.ones(1, 7, 7), torch.tensor([[3.0, 5.0, 3.0, 9.0]]), (11, 13)).any()


def samples(boxes, matches):
    return SampledBoxes([boxes], [torch.tensor(matches)], [torch.zeros(len(matches), dtype=torch.bool)])


def test_goals_are_the_part_of_the_mask_inside_of_the_box():
    target = {"masks": torch.stack([rectangle((8, 16, 24, 32), (41, 43)), torch.zeros(41, 43)])}
    boxes = torch.tensor([[0.0, 16.0, 16.0, 32.0], [8.0, 16.0, 24.0, 32.0]])
    found = mask_goals(samples(boxes, [0, 1]), [target], 4)
    assert torch.equal(found[0], torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(4, 4))
    assert not found[1].any()


def test_the_mask_loss_of_no_boxes_is_zero():
    logits = torch.zeros(0, 3, 28, 28, requires_grad=True)
    target = {"masks": torch.zeros(0, 5, 7), "labels": torch.zeros(0, dtype=torch.long)}
    loss = mask_loss(logits, samples(torch.zeros(0, 4), []), [target])
    loss.backward()
    assert loss == 0


@pytest.mark.parametrize(("side", "level"), [(17, 0), (111, 0), (113, 1), (223, 1), (449, 3), (1009, 3)])
def test_boxes_are_pooled_from_the_level_of_their_size(side, level):
    levels = [
        torch.full((1, 2, 1024 // stride, 1024 // stride), float(index)) for index, stride in enumerate((4, 8, 16, 32))
    ]
    pooled = RoIPool(7)(levels, [torch.tensor([[2.0, 3.0, 2.0 + side, 3.0 + side]])])
    assert torch.equal(pooled, torch.full((1, 2, 7, 7), float(level)))


def test_pooled_values_are_those_under_the_box():
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)  # the value of a column of stride 4 is its index
    levels = [ramp, *(torch.zeros(1, 1, 64 // factor, 64 // factor) for factor in (2, 4, 8))]
    pooled = RoIPool(7)(levels, [torch.tensor([[20.0, 12.0, 76.0, 68.0]])])
    expected = (20 + 56 * (torch.arange(7) + 0.5) / 7) / 4 - 0.5
    torch.testing.assert_close(pooled[0, 0], expected.expand(7, 7))


def soft_one_by_one(boxes, scores, labels, overlap, limit):
    iou, left, found = box_iou(boxes, boxes), dict(enumerate(scores.tolist())), []
    while left and len(found) < limit:
        best = max(left, key=left.__getitem__)
        if left[best] < 1e-3:
            break
        found.append((best, left.pop(best)))
        for index in left:
            if labels[index] == labels[best] and iou[best, index] > overlap:
                left[index] *= 1 - iou[best, index].item()
    return found


@settings(max_examples=31, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), limit=st.sampled_from([5, 100]))
def test_soft_suppression_lowers_scores_box_by_box(seed, limit):
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(17, 2, generator=generator) * 11
    boxes = torch.cat([start, start + 1 + torch.rand(17, 2, generator=generator) * 13], 1)
    scores, labels = torch.rand(17, generator=generator), torch.randint(1, 3, (17,), generator=generator)
    kept, lowered = soft_nms(boxes, scores, labels, 0.3, limit)
    expected = soft_one_by_one(boxes, scores, labels, 0.3, limit)
    assert kept.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(lowered, torch.tensor([score for _, score in expected]))


@pytest.mark.parametrize("soft", [False, True])
def test_detections_are_chosen_by_class(soft):
    boxes = torch.tensor([[1.0, 2.0, 11.0, 12.0], [1.0, 2.0, 11.0, 13.0]])[:, None].expand(-1, 3, -1)
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.3, 0.65, 0.05]])
    found = best_detections(scores, boxes, (17, 9), threshold=0.05, overlap=0.5, soft=soft)
    iou = 100 / 110
    expected = [0.7, 0.2] + ([0.65 * (1 - iou)] if soft else [])
    torch.testing.assert_close(found["scores"], torch.tensor(expected))
    assert found["labels"].tolist() == [1, 2] + ([1] if soft else [])
    assert found["boxes"][0].tolist() == [1, 2, 9, 12]  # inside of the image


@pytest.mark.parametrize("soft", [False, True])
def test_an_image_without_detections_has_empty_ones(soft):
    found = best_detections(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2, 4), (5, 7), soft=soft)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "scores": (0,)}
