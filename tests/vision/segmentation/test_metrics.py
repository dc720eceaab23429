"""Mean IoU from confusion matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from vision.segmentation.metrics import IoUEvaluator


def by_sets(predicted, expected, classes):
    """Return the mean IoU from sets of pixels, ignoring class 255."""
    pixels = [index for index, label in enumerate(expected.flatten().tolist()) if label != 255]
    predicted, expected = predicted.flatten().tolist(), expected.flatten().tolist()
    scores = []
    for number in range(classes):
        ours = {index for index in pixels if predicted[index] == number}
        theirs = {index for index in pixels if expected[index] == number}
        if ours | theirs:
            scores.append(len(ours & theirs) / len(ours | theirs))
    return 100 * sum(scores) / len(scores)


@given(seed=st.integers(0, 2**32 - 1), classes=st.integers(2, 7))
def test_miou_equals_that_of_sets(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randint(0, classes, (3, 5, 7), generator=generator)
    predicted = torch.randint(0, classes, (3, 5, 7), generator=generator)
    expected[torch.rand(expected.shape, generator=generator) < 0.2] = 255
    expected[0, 0, 0] = 0
    evaluator = IoUEvaluator(classes)
    evaluator.update(predicted[:2], expected[:2])
    evaluator.update(predicted[2:], expected[2:])
    assert evaluator.compute().miou == pytest.approx(by_sets(predicted, expected, classes))


def test_absent_classes_do_not_count():
    evaluator = IoUEvaluator(3)
    evaluator.update(torch.tensor([[[0, 1]]]), torch.tensor([[[0, 1]]]))
    metrics = evaluator.compute()
    assert metrics.miou == 100
    assert torch.isnan(metrics.iou[2])


def test_accuracies_count_pixels_and_classes():
    evaluator = IoUEvaluator(2)
    evaluator.update(torch.tensor([[[0, 0, 0, 1]]]), torch.tensor([[[0, 0, 0, 0]]]))
    evaluator.update(torch.tensor([[[1]]]), torch.tensor([[[1]]]))
    metrics = evaluator.compute()
    assert metrics.all_accuracy == pytest.approx(80)
    assert metrics.mean_accuracy == pytest.approx((75 + 100) / 2)
