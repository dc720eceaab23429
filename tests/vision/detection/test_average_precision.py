"""Average precision compared with pycocotools."""

import contextlib
import io
import json
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("faster_coco_eval")

from tests.support.coco_files import polygon
from tests.support.two_processes import in_two_processes
from vision.detection.average_precision import NAMES, AveragePrecisionEvaluator, average_precision, detections_of
from vision.detection.coco_json import read_coco
from vision.distributed.context import World

HEIGHT, WIDTH = 97, 131
IDS = (2, 5, 11)


def annotated(generator):
    """Images with boxes of many sizes; every seventh object is a crowd by run lengths."""
    images = [
        {"id": 10 + 7 * index, "file_name": f"{index}.png", "height": HEIGHT, "width": WIDTH} for index in range(13)
    ]
    annotations = []
    for image in images:
        for _ in range(generator.integers(6)):
            width, height = generator.uniform(4, 80, 2)
            left, top = generator.uniform(0, WIDTH - width), generator.uniform(0, HEIGHT - height)
            is_crowd = len(annotations) % 7 == 6
            runs = {"size": [HEIGHT, WIDTH], "counts": [97 * 20, 97 * 31, 97 * 80]}
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(generator.choice(IDS)),
                    "bbox": [left, top, width, height],
                    "area": width * height * 0.8,
                    "iscrowd": int(is_crowd),
                    "segmentation": runs
                    if is_crowd
                    else [[*polygon(left, top, width, height)[:6], left + width / 3, top + height]],
                }
            )
    categories = [{"id": number, "name": str(number)} for number in IDS]
    return {"images": images, "annotations": annotations, "categories": categories}


def detected(generator, image):
    """Return boxes near the annotated ones, and others."""
    found = [(np.array(item.box) + generator.normal(0, 2, 4), item.label) for item in image.objects]
    for _ in range(3):
        left, top, width, height = generator.uniform(3, 60, 4)
        found.append((np.array([left, top, left + width, top + height]), int(generator.integers(1, 4))))
    masks = np.zeros((len(found), HEIGHT, WIDTH), bool)
    for mask, (box, _) in zip(masks, found, strict=True):
        left, top, right, bottom = box.clip(0).astype(int)
        mask[top : bottom + 1, left : right + 1] = True
    return {
        "boxes": torch.tensor(np.array([box for box, _ in found])),
        "labels": torch.tensor([label for _, label in found]),
        "scores": torch.tensor(generator.random(len(found))),
        "masks": torch.tensor(masks),
    }


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Return an evaluator to which all images of a file were added."""
    generator, path = np.random.default_rng(1), tmp_path_factory.mktemp("coco") / "instances.json"
    path.write_text(json.dumps(annotated(generator)))
    annotations = read_coco(path)
    evaluator = AveragePrecisionEvaluator(annotations, with_masks=True)
    for index, image in enumerate(annotations.images):
        evaluator.add([detected(generator, image)], [index])
    return path, evaluator


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equals_pycocotools(evaluated, kind):
    reference = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    path, evaluator = evaluated
    annotations = evaluator.annotations
    results = [
        row
        for item in evaluator.found
        for row in item.results(annotations.category_ids, annotations.images[item.image].number, kind)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = reference.COCO(str(path))
        expected = COCOeval(truth, truth.loadRes(results), kind)
        expected.evaluate()
        expected.accumulate()
        expected.summarize()
    metrics = evaluator.compute()
    found = torch.tensor(list((metrics.box if kind == "bbox" else metrics.mask).values()), dtype=torch.float64)
    stats = torch.tensor(expected.stats[:6])
    torch.testing.assert_close(found, torch.where(stats < 0, torch.nan, 100 * stats), equal_nan=True)
    assert found[0] > 5


def test_objects_found_exactly_are_100_percent(evaluated):
    annotations = evaluated[1].annotations
    found = []
    for index, image in enumerate(annotations.images):
        objects = [item for item in image.objects if not item.is_crowd]
        output = {
            "boxes": torch.tensor([item.box for item in objects], dtype=torch.float64).view(-1, 4),
            "labels": torch.tensor([item.label for item in objects], dtype=torch.int64),
            "scores": torch.ones(len(objects)),
        }
        found.append(detections_of(index, output))
    assert average_precision(annotations, found)["ap"] == pytest.approx(100)


def test_images_that_were_not_added_do_not_count(evaluated):
    annotations = evaluated[1].annotations
    with_objects = next(index for index, image in enumerate(annotations.images) if image.objects)
    partial, whole = (AveragePrecisionEvaluator(annotations, with_masks=False) for _ in range(2))
    partial.found = [item for item in evaluated[1].found if item.image == with_objects]
    whole.found = partial.found + [item for item in evaluated[1].found if item.image != with_objects]
    assert partial.compute().images == 1
    assert partial.compute().box["ap"] != whole.compute().box["ap"]


def test_the_order_of_images_does_not_matter(evaluated):
    evaluator = AveragePrecisionEvaluator(evaluated[1].annotations, with_masks=True)
    evaluator.found = evaluated[1].found[::-1]
    assert evaluator.compute().scalars() == evaluated[1].compute().scalars()


def test_padding_does_not_count(evaluated):
    evaluator = AveragePrecisionEvaluator(evaluated[1].annotations, with_masks=False)
    evaluator.add([detected(np.random.default_rng(0), evaluator.annotations.images[0])], [-1])
    assert evaluator.found == []


def test_no_detections_are_0_percent(evaluated):
    evaluator = AveragePrecisionEvaluator(evaluated[1].annotations, with_masks=True)
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    evaluator.add([none] * 13, range(13))
    metrics = evaluator.compute()
    assert metrics.box["ap"] == 0
    assert metrics.mask is None
    assert set(metrics.scalars()) <= {f"box_{name}" for name in NAMES}


def test_non_finite_boxes_are_omitted():
    output = {
        "boxes": torch.tensor([[0, 0, float("nan"), 5], [1, 1, 2, 2.0], [0, 0, 5, 5]]),
        "labels": torch.tensor([1, 2, 3]),
        "scores": torch.tensor([0.5, 0.5, float("inf")]),
        "masks": torch.zeros(3, 5, 7, dtype=torch.bool),
    }
    found = detections_of(0, output)
    assert found.labels.tolist() == [2]
    assert len(found.masks) == 1


def evaluate_a_share(annotations, found, expected, rank):
    evaluator = AveragePrecisionEvaluator(annotations, with_masks=True)
    evaluator.found = found[rank::2]
    assert evaluator.compute(World(rank, 2)).scalars() == expected


def test_two_processes_compute_the_same_as_one(evaluated, tmp_path):
    annotations, found = evaluated[1].annotations, evaluated[1].found
    expected = evaluated[1].compute().scalars()
    in_two_processes(partial(evaluate_a_share, annotations, found, expected), tmp_path)
