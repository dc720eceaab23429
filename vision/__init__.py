"""RevCol for images: the family in timm's registry, its supervision, training, evaluation and recipes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vision import revcol  # registers the models with timm

if TYPE_CHECKING:
    from vision.models.architecture import RevCol
    from vision.training.loaded_run import LoadedRun, load_run

__all__ = ["LoadedRun", "RevCol", "load_run", "revcol"]

_LAZY = {
    "LoadedRun": "vision.training.loaded_run",
    "RevCol": "vision.models.architecture",
    "load_run": "vision.training.loaded_run",
}
"""Names that are imported from these modules on first use."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
