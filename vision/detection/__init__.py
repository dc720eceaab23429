"""Object detection with RevCol backbones, built on the components of `torchvision.models.detection`.

No module of this package may have the name of a function below: importing the module would replace the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision.detection.copy_paste import CopyPaste
    from vision.detection.dino_detr.dino_detector import DINO, dino
    from vision.detection.planned_step import DetectionStep
    from vision.detection.rcnn.cascade_rcnn import RegionDetector, cascade_mask_rcnn
    from vision.detection.rcnn.hybrid_task_cascade import htc

__all__ = ["DINO", "CopyPaste", "DetectionStep", "RegionDetector", "cascade_mask_rcnn", "dino", "htc"]

_LAZY = {
    "DINO": "vision.detection.dino_detr.dino_detector",
    "CopyPaste": "vision.detection.copy_paste",
    "DetectionStep": "vision.detection.planned_step",
    "RegionDetector": "vision.detection.rcnn.cascade_rcnn",
    "cascade_mask_rcnn": "vision.detection.rcnn.cascade_rcnn",
    "dino": "vision.detection.dino_detr.dino_detector",
    "htc": "vision.detection.rcnn.hybrid_task_cascade",
}
"""The module of each name, imported on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
