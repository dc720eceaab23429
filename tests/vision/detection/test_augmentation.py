"""Multi-scale training of detectors."""

import pytest
import torch

pytest.importorskip("torchvision")

from vision.config.data import CocoConfig
from vision.detection.augmentation import MultiScaleAugmentation


def augmented(size, boxes, **options):
    height, width = size
    config = CocoConfig(name="coco", root="unused", **options)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.ones(len(boxes), dtype=torch.int64),
        "masks": torch.ones(len(boxes), height, width, dtype=torch.uint8),
    }
    return MultiScaleAugmentation(config)(torch.zeros(3, height, width, dtype=torch.uint8), target)


@pytest.mark.parametrize("size", [(375, 500), (426, 640), (612, 612), (333, 499)])
def test_objects_at_the_border_stay(size):
    height, width = size
    for side in (480, 640, 672, 704, 768, 800):
        boxes = [[0, 0, width, height], [width / 2, height / 2, width, height]]
        image, target = augmented(size, boxes, short_sides=(side,), crop=0.0, hflip=0.5)
        assert len(target["boxes"]) == len(target["masks"]) == 2
        assert target["boxes"][:, 2].max() <= image.shape[2]
        assert target["boxes"][:, 3].max() <= image.shape[1]


def test_crops_remove_what_is_outside():
    torch.manual_seed(0)
    counts = set()
    sizes = {"crop": 1.0, "crop_short_sides": (64,), "crop_sizes": (48, 60)}
    for _ in range(20):
        image, target = augmented((97, 131), [[0, 0, 7, 7], [2, 3, 131, 97]], **sizes)
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        assert target["masks"].shape[1:] == image.shape[1:]
        counts.add(len(target["boxes"]))
    assert counts == {1, 2}
