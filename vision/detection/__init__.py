"""Object detection with RevCol backbones, on the parts of `torchvision.models.detection`.

No module of this folder has the name of a function below: an import of the module would replace the function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision.detection.cascade_rcnn import CascadeMaskRCNN, cascade_mask_rcnn

__all__ = ["CascadeMaskRCNN", "cascade_mask_rcnn"]

_LAZY = {
    "CascadeMaskRCNN": "vision.detection.cascade_rcnn",
    "cascade_mask_rcnn": "vision.detection.cascade_rcnn",
}
"""Modules that are imported when one of their names is first used."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
