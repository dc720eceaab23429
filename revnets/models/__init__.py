"""Whole models: networks built from a specification, models loaded by name, and their memory plans."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from revnets.models.loading import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    if name == "load_model":  # imported on first use: building a network does not need it
        from revnets.models.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
