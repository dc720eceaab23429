"""Small data sets of images with objects in the format of COCO, and a detector of torchvision for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image
from pydantic import TypeAdapter
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork

from revnets.config.loader import validate
from vision.config.data import CocoConfig
from vision.tasks.object_detection import ObjectDetection

COLORS = np.array([[210, 40, 40], [40, 200, 60]], np.uint8)
CATEGORIES = [{"id": 3, "name": "red"}, {"id": 7, "name": "green"}]
SIZE = (48, 64)


def content(count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Write images of one to three rectangles on gray; return their annotations with polygons."""
    generator, folder = np.random.default_rng(seed), folder
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(count):
        pixels = np.full((*SIZE, 3), 128, np.uint8)
        images.append({"id": 100 + number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
        for slot in generator.permutation(3)[: generator.integers(1, 4)].tolist():
            left, top = 2 + 20 * slot + int(generator.integers(3)), int(generator.integers(2, 20))
            width, height = (int(value) for value in generator.integers(12, 17, 2))
            kind = int(generator.integers(2))
            pixels[top : top + height, left : left + width] = COLORS[kind]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + number,
                    "category_id": CATEGORIES[kind]["id"],
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    "segmentation": [polygon(left, top, width, height)],
                }
            )
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def polygon(left: float, top: float, width: float, height: float) -> list[float]:
    """Return the outline of a box as a polygon."""
    return [left, top, left + width, top, left + width, top + height, left, top + height]


def make_files(root: Path, train: int = 7, val: int = 3) -> Path:
    """Write both splits in the layout of COCO."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count, seed in (("train", train, 0), ("val", val, 1)):
        found = content(count, seed, root / f"{split}2017")
        write(root, split, found)
    return root


def write(root: Path, split: str, found: Any) -> Path:
    path = root / "annotations" / f"instances_{split}2017.json"
    path.write_text(json.dumps(found))
    return path


def read(root: Path, split: str) -> dict[str, Any]:
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def settings(root: Path, **options: Any) -> CocoConfig:
    return validate(TypeAdapter(CocoConfig), {**values(root), **options})


def values(root: Path) -> dict[str, Any]:
    """Return the key `data` of a run on these files."""
    sides = {"short_sides": [48, 56], "long_side": 80, "val_short_side": 56}
    return {"name": "coco", "root": str(root), **sides, "crop_short_sides": [40, 48], "crop_sizes": [32, 40]}


class Pyramid(nn.Module):
    """The levels of a RevCol for components of torchvision."""

    out_channels = 16

    def __init__(self, name: str, **options: Any):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **options)
        self.pyramid = FeaturePyramidNetwork(self.body.feature_info.channels(), self.out_channels)

    def forward(self, x: Any) -> Any:
        return self.pyramid({str(level): feature for level, feature in enumerate(self.body(x))})


class SmallMaskRCNN(ObjectDetection):
    """Mask R-CNN of torchvision, with few channels."""

    def needs_masks(self) -> bool:
        return True

    def create_detector(self, backbone: str, num_classes: int, **options: Any) -> nn.Module:
        pyramid = Pyramid(backbone, **options)
        levels = len(pyramid.body.feature_info.channels())
        anchors = AnchorGenerator(tuple((size,) for size in (8, 16, 32, 64)[:levels]), ((0.5, 1.0, 2.0),) * levels)
        few = {"rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 50, "rpn_pre_nms_top_n_test": 50}
        few |= {
            "rpn_post_nms_top_n_test": 50,
            "box_batch_size_per_image": 32,
            "rpn_batch_size_per_image": 32,
            "box_score_thresh": 0.0,
        }
        model = MaskRCNN(pyramid, num_classes + 1, rpn_anchor_generator=anchors, **few)
        model.transform = GeneralizedRCNNTransform(1, 10_000, [0.0] * 3, [1.0] * 3, _skip_resize=True)
        return model
