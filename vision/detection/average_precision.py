"""Average precision of boxes and masks as COCO defines it, computed by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from vision.detection.coco_json import CocoAnnotations
from vision.detection.instance_masks import coco_segmentation, missing_library, packed_mask
from vision.distributed.context import World

NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""COCO's metrics: over IoU thresholds from 0.5 to 0.95, at 0.5, at 0.75, and for objects with an area of up to 32²,
up to 96², and above."""


@dataclass(frozen=True, slots=True)
class DetectionMetrics:
    """Average precision of one set of weights, in percent. A metric is NaN if no object has its area.

    Attributes:
        box: Average precision of boxes, with the keys of `NAMES`.
        mask: Average precision of masks; None without masks.
        images: Number of evaluated images.
    """

    box: Mapping[str, float]
    mask: Mapping[str, float] | None
    images: int

    def scalars(self) -> dict[str, float]:
        """Return `box_ap`, `mask_ap50` and so on for logs, without NaN values other than `box_ap`."""
        kinds = {"box": self.box, "mask": self.mask or {}}
        metrics = {f"{kind}_{name}": value for kind, values in kinds.items() for name, value in values.items()}
        return {name: value for name, value in metrics.items() if value == value or name == "box_ap"}


@dataclass(frozen=True, slots=True)
class ImageDetections:
    """The detections in one image.

    Attributes:
        image: Index of the image in the annotations.
        boxes: (N, 4), left, top, width, height in pixels of the file.
        masks: COCO run lengths of each mask; None for detectors without masks.
    """

    image: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: Sequence[dict[str, Any]] | None

    def results(self, category_ids: Sequence[int], image_id: int, kind: str) -> list[dict[str, Any]]:
        """Return the detections in COCO's results format, with boxes or masks.

        COCO computes the area of an object from the one that is present.

        Args:
            category_ids: Id of each class in the file.
            image_id: Id of the image in the results.
            kind: `bbox` or `segm`.
        """
        values = [box.tolist() for box in self.boxes] if kind == "bbox" else self.masks or ()
        key = "bbox" if kind == "bbox" else "segmentation"
        rows = zip(values, self.scores.tolist(), self.labels.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": category_ids[label - 1], "score": score, key: value}
            for value, score, label in rows
        ]


def detections_of(image: int, output: Mapping[str, Tensor]) -> ImageDetections:
    """Convert the output of a detector, in pixels of the file. Objects with non-finite values are omitted.

    Args:
        image: Index of the image in the annotations.
        output: `boxes` (N, 4) as left, top, right, bottom, `labels` (N,) from 1, `scores` (N,), and optional `masks`
            (N, H, W) of zeros and ones.
    """
    corners = output["boxes"].double().cpu().numpy().reshape(-1, 4)
    scores, labels = output["scores"].double().cpu().numpy(), output["labels"].cpu().numpy()
    keep = np.isfinite(corners).all(1) & np.isfinite(scores)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)[keep]
    masks: list[dict[str, Any]] | None = None
    if "masks" in output:
        masks = [packed_mask(output["masks"][index].cpu().numpy()) for index in np.flatnonzero(keep)]
    return ImageDetections(image, boxes, scores[keep], labels[keep], masks)


class AveragePrecisionEvaluator:
    """Accumulates detections and computes their average precision.

    Args:
        annotations: The ground truth. Images that are never added do not count.
        with_masks: Whether the annotations have masks. If so, masks of the detector are evaluated as well.

    Raises:
        revnets.SpecError: If faster-coco-eval is not installed.
    """

    def __init__(self, annotations: CocoAnnotations, with_masks: bool):
        require_library()
        self.annotations, self.with_masks = annotations, with_masks
        self.found: list[ImageDetections] = []

    def add(self, output: Iterable[Mapping[str, Tensor]], images: Iterable[int]) -> None:
        """Add the outputs of a detector.

        Args:
            output: One mapping for each image, as for `detections_of`.
            images: Index of each image in the annotations. Negative ones do not count.
        """
        self.found += [
            detections_of(image, detections) for detections, image in zip(output, images, strict=True) if image >= 0
        ]

    def compute(self, world: World | None = None) -> DetectionMetrics:
        """Return the metrics over the images of all processes. The main process computes them."""
        world = world or World()
        found = sorted((item for part in world.collect(self.found) for item in part), key=lambda item: item.image)
        return world.by_main(lambda: self._evaluated(found))

    def _evaluated(self, found: list[ImageDetections]) -> DetectionMetrics:
        box = average_precision(self.annotations, found, "bbox")
        has_masks = self.with_masks and any(item.masks is not None for item in found)
        mask = average_precision(self.annotations, found, "segm") if has_masks else None
        return DetectionMetrics(box, mask, len(found))


def average_precision(
    annotations: CocoAnnotations, found: Sequence[ImageDetections], kind: Literal["bbox", "segm"] = "bbox"
) -> dict[str, float]:
    """Return the average precision in percent over the images of `found`, with the keys of `NAMES`.

    Args:
        annotations: The ground truth.
        found: The detections of each image.
        kind: `bbox`, or `segm` for masks.

    Raises:
        revnets.SpecError: If faster-coco-eval is not installed.
    """
    require_library()
    from faster_coco_eval import COCO, COCOeval_faster

    numbers = [item.image for item in found]
    truth = COCO(_dataset(annotations, numbers, kind == "segm"))
    results = [row for item in found for row in item.results(annotations.category_ids, item.image, kind)]
    evaluation = COCOeval_faster(truth, truth.loadRes(results), kind, print_function=_silent)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = [float(value) for value in evaluation.stats[: len(NAMES)]]
    return {name: 100 * value if value >= 0 else float("nan") for name, value in zip(NAMES, values, strict=True)}


def _dataset(annotations: CocoAnnotations, numbers: Sequence[int], with_masks: bool) -> dict[str, Any]:
    """Return the annotations of some images in COCO's format, with their indices as image ids."""
    rows: list[dict[str, Any]] = []
    for number in numbers:
        image = annotations.images[number]
        for item in image.objects:
            row: dict[str, Any] = {
                "id": len(rows) + 1,
                "image_id": number,
                "category_id": annotations.category_ids[item.label - 1],
                "bbox": list(item.written_box),
                "area": item.area,
                "iscrowd": int(item.is_crowd),
            }
            if with_masks and item.segmentation is not None:
                row["segmentation"] = coco_segmentation(item.segmentation, image.height, image.width)
            rows.append(row)
    sizes = [(number, annotations.images[number]) for number in numbers]
    images = [{"id": number, "height": image.height, "width": image.width} for number, image in sizes]
    categories = [{"id": number, "name": str(number)} for number in annotations.category_ids]
    return {"images": images, "annotations": rows, "categories": categories}


def require_library() -> None:
    """Raise a `revnets.SpecError` if faster-coco-eval is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        raise missing_library() from None


def _silent(*_: object) -> None:
    """Discard the output of the library."""
