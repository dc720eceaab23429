"""Anchors, samples, matches and codes of boxes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchvision")

from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from vision.detection.rcnn.region_proposals import BoxSampler, FloatBoxCoder, OverlapMatcher, RegionProposals

SIZE = (61, 93)


def intersection_over_union(first, second):
    width, height = (min(first[i + 2], second[i + 2]) - max(first[i], second[i]) for i in (0, 1))
    common = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return common / (sum(areas) - common)


def random_boxes(count, generator, side=23):
    start = torch.randint(0, side, (count, 2), generator=generator)
    return torch.cat([start, start + torch.randint(1, side, (count, 2), generator=generator)], 1).float()


def matches_one_by_one(objects, boxes, positive, negative, low_quality):
    """mmdetection's `MaxIoUAssigner` in plain Python."""
    table = [[intersection_over_union(one, box) for box in boxes.tolist()] for one in objects.tolist()]
    found = []
    for column in zip(*table, strict=True):
        best = max(column)
        found.append(column.index(best) if best >= positive else (-1 if best < negative else -2))
    for number, row in enumerate(table):
        if low_quality is not None and max(row) >= low_quality:
            found = [number if overlap == max(row) else old for overlap, old in zip(row, found, strict=True)]
    return found


@given(seed=st.integers(0, 2**32 - 1), low_quality=st.sampled_from([None, 0.2, 0.5]))
def test_matches_are_those_of_mmdetection(seed, low_quality):
    generator = torch.Generator().manual_seed(seed)
    objects, boxes = random_boxes(3, generator).double(), random_boxes(13, generator).double()
    found = OverlapMatcher(0.5, 0.3, low_quality)(objects, boxes)
    assert found.tolist() == matches_one_by_one(objects, boxes, 0.5, 0.3, low_quality)


def test_boxes_are_background_where_there_are_no_objects():
    matcher, boxes = OverlapMatcher(0.5, 0.5), torch.rand(7, 4)
    assert matcher(torch.zeros(0, 4), boxes).tolist() == [-1] * 7
    assert matcher(boxes, torch.zeros(0, 4)).tolist() == []


def anchors_of(size=SIZE):
    padded = [-(-side // 32) * 32 for side in size]
    maps = [torch.zeros(1, 5, *(-(-side // stride) for side in padded)) for stride in (4, 8, 16, 32, 64)]
    return RegionProposals(5).anchor_generator(ImageList(torch.zeros(1, 3, *padded), [size]), maps)[0], maps


def test_anchors_are_at_the_strides_and_not_rounded():
    anchors, maps = anchors_of()
    centers, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    first = 0
    for level, stride in zip(maps, (4, 8, 16, 32, 64), strict=True):
        height, width = level.shape[-2:]
        last = first + 3 * height * width
        expected = torch.tensor([[column, row] for row in range(height) for column in range(width)]) * float(stride)
        torch.testing.assert_close(centers[first:last], expected.repeat_interleave(3, 0))
        ratios = sides[first:last, 1] / sides[first:last, 0]
        torch.testing.assert_close(ratios, torch.tensor([0.5, 1.0, 2.0]).repeat(height * width))
        torch.testing.assert_close(sides[first:last].prod(1), torch.full_like(ratios, (8 * stride) ** 2))
        first = last
    assert first == len(anchors)


def test_anchors_across_the_border_do_not_count():
    anchors, _ = anchors_of()
    target = {"boxes": torch.tensor([[5.0, 7.0, 37.0, 41.0]]), "image_size": SIZE}
    labels, _ = RegionProposals(5).assign_targets_to_anchors([anchors], [target])
    inside = (anchors >= 0).all(1) & (anchors[:, 2] < 93) & (anchors[:, 3] < 61)
    assert (labels[0][~inside] == -1).all()
    assert {0.0, 1.0} <= set(labels[0][inside].tolist())


@pytest.mark.parametrize(("positive", "negative"), [(0.1, 0.8), (0.7, 0.1), (0.0, 0.0), (0.0, 1.0)])
def test_boxes_are_sampled_as_by_torchvision(positive, negative):
    scores = torch.rand(97, generator=torch.Generator().manual_seed(3))
    is_positive, is_negative = scores < positive, scores >= 1 - negative
    torch.manual_seed(5)
    found = BoxSampler(31, 0.25)(is_positive, is_negative)
    torch.manual_seed(5)
    labels = torch.where(is_positive, 1.0, torch.where(is_negative, 0.0, -1.0))
    masks = BalancedPositiveNegativeSampler(31, 0.25)([labels])
    assert [rows.tolist() for rows in found] == [mask[0].nonzero().squeeze(1).tolist() for mask in masks]


def test_losses_of_proposals_are_those_of_torchvision():
    generator = torch.Generator().manual_seed(2)
    objectness, codes = torch.randn(194, 1, generator=generator), torch.randn(194, 4, generator=generator)
    labels = list(torch.randint(-1, 2, (2, 97), generator=generator).float())
    goals = list(torch.randn(2, 97, 4, generator=generator))
    proposals = RegionProposals(5)
    torch.manual_seed(7)
    found = proposals.compute_loss(objectness, codes, labels, goals)
    proposals.fg_bg_sampler = BalancedPositiveNegativeSampler(256, 0.5)
    torch.manual_seed(7)
    expected = RegionProposalNetwork.compute_loss(proposals, objectness, codes, labels, goals)
    assert [loss.item() for loss in found] == [loss.item() for loss in expected]


def test_codes_are_bounded_on_both_sides():
    boxes = torch.tensor([[3.0, 5.0, 13.0, 27.0]])
    codes = torch.tensor([[0.1, -0.2, -50.0, 50.0]])
    left, top, right, bottom = FloatBoxCoder((1.0, 1.0, 1.0, 1.0)).decode_single(codes, boxes)[0].tolist()
    assert right - left == pytest.approx(10 * 16 / 1000, rel=1e-4)
    assert bottom - top == pytest.approx(22 * 1000 / 16, rel=1e-4)


def test_codes_of_half_precision_give_boxes_of_single_precision():
    weights = (10.0, 10.0, 5.0, 5.0)
    boxes = torch.tensor([[1001.0, 1003.0, 1201.0, 1301.0]])
    codes = torch.tensor([[0.5, 0.25, 0.125, math.log(2)]]).bfloat16()
    found = FloatBoxCoder(weights).decode_single(codes, boxes)
    torch.testing.assert_close(found, BoxCoder(weights).decode_single(codes.float(), boxes))
