"""Noisy copies of objects."""

import torch
from torchvision.ops import box_convert

from vision.detection.dino_detr.denoising_queries import ContrastiveDenoising
from vision.detection.dino_detr.target_boxes import TargetBoxes

CLASSES, DIM, QUERIES, COPIES = 7, 3, 5, 11
COUNTS = (3, 1, 0)
MOST, GROUPS = 3, 11 // 3


def objects(counts=COUNTS):
    generator = torch.Generator().manual_seed(0)
    items = []
    for count in counts:
        centers = torch.rand(count, 2, generator=generator) * 0.2 + 0.4
        sides = torch.rand(count, 2, generator=generator) * 0.1 + 0.05  # noise of a whole side stays inside
        labels = torch.randint(CLASSES, (count,), generator=generator)
        items.append(TargetBoxes(torch.cat([centers, sides], -1), labels, torch.ones(4)))
    return items


def noisy(counts=COUNTS, **options):
    torch.manual_seed(1)
    module = ContrastiveDenoising(CLASSES, DIM, QUERIES, COPIES, **options)
    return module, module(objects(counts), QUERIES)


def corner_shifts(found, item, image, sign):
    """Shifts of the corners of one image's copies that have an area, in half sides: (copies, 4)."""
    boxes = found.references[image].view(GROUPS, 2, MOST, 4)[:, sign, : len(item.labels)]
    shifts = box_convert(boxes, "cxcywh", "xyxy") - box_convert(item.boxes, "cxcywh", "xyxy")
    return (shifts.abs() / (item.boxes[:, 2:].repeat(1, 2) / 2))[(boxes[..., 2:] > 0.002).all(-1)]


def test_positive_copies_are_near_and_negative_ones_further():
    found, item = noisy()[1], objects()[0]
    positive, negative = (corner_shifts(found, item, 0, sign) for sign in (0, 1))
    assert min(len(positive), len(negative)) > 2
    assert positive.max() < 1.001
    assert negative.min() > 0.999
    assert negative.max() < 2.001


def test_the_number_of_groups_follows_the_number_of_copies():
    _, found = noisy()
    assert found.groups == GROUPS
    assert found.contents.shape == (len(COUNTS), 2 * GROUPS * MOST, DIM)


def test_copies_have_the_embeddings_of_their_labels():
    module, found = noisy(label_noise=0.0)
    contents = found.contents.view(len(COUNTS), GROUPS, 2, MOST, DIM)
    for image, item in enumerate(objects()):
        count = len(item.labels)
        expected = module.labels(item.labels).expand(GROUPS, 2, count, DIM)
        torch.testing.assert_close(contents[image, :, :, :count], expected)
        assert not contents[image, :, :, count:].any()


def test_labels_are_wrong_at_half_the_noise_rate():
    torch.manual_seed(1)
    module = ContrastiveDenoising(997, DIM, QUERIES, COPIES, label_noise=0.5)
    labels = torch.zeros(101, 103, dtype=torch.long)
    wrong = (module._noisy_labels(labels) != labels).double().mean()
    assert abs(wrong - 0.25) < 0.02


def test_groups_do_not_attend_to_each_other():
    blocked = noisy()[1].blocked
    copies, size = 2 * GROUPS * MOST, 2 * MOST
    for row in range(copies + QUERIES):
        for column in range(copies + QUERIES):
            is_copy = column < copies
            expected = is_copy and (row >= copies or row // size != column // size)
            assert bool(blocked[row, column]) == expected


def test_pairs_lead_to_the_objects_of_copies():
    _, found = noisy(box_noise=0.0)
    for image, item in enumerate(objects()):
        pairs = found.pairs[image]
        assert len(pairs.queries) == GROUPS * len(item.labels)
        torch.testing.assert_close(found.references[image, pairs.queries], item.boxes[pairs.objects])


def test_at_most_as_many_objects_as_queries_are_copied():
    found = noisy(counts=(13, 2))[1]
    assert found.contents.shape[1] == 2 * 2 * QUERIES  # groups of 5 positive copies; 11 // 5 of them
    assert found.pairs[0].objects.max() == QUERIES - 1


def test_a_batch_without_objects_has_no_copies():
    module, found = noisy(counts=(0, 0))
    assert found.contents.shape[1] == 0
    assert found.blocked.shape == (QUERIES, QUERIES)
    found.contents.sum().backward()
    assert torch.equal(module.labels.weight.grad, torch.zeros(CLASSES, DIM))
