"""Checks of the images of a run against its heads: which source has labels of which head, found by which keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from revnets.config.errors import nearest, problem
from vision.config.data import ImagesConfig, SourcesConfig

HEADS_HINT = "Name the sets of classes, as in heads: {in1k: 1000, places: 365}"


def require_heads(data: Any, heads: Mapping[str, int] | None) -> None:
    """Check the keys of each source of images that depend on the heads of a run.

    Args:
        data: The key `data` of the run.
        heads: Of the run; None if it has a single set of classes.

    Raises:
        PydanticCustomError: If a source has no labels of any head or of an unknown one, its reader has no keys to find
            `labels` and `exclude` by, or a weight has no effect.
    """
    is_list = isinstance(data, SourcesConfig)
    sources = data.sources if isinstance(data, SourcesConfig) else [data]
    for number, source in enumerate(sources):
        place = ("data", number) if is_list else ("data",)
        if isinstance(source, ImagesConfig):
            _require_labels(source, heads, place)
            _require_keys(source, heads, place)
        elif heads is not None:
            raise problem("the data has one set of classes", "Remove the key", "heads", code="conflicting-values")
    if is_list and heads is None:
        raise problem("several sources of images need heads", HEADS_HINT, "heads", code="missing-key")
    if heads is not None and len(sources) == 1 and sources[0].weight is not None:
        place = ("data", 0) if is_list else ("data",)
        text = "a weight has no effect on a single source"
        raise problem(text, "Remove the key", *place, "weight", code="conflicting-values")


def _require_labels(source: ImagesConfig, heads: Mapping[str, int] | None, place: tuple[str | int, ...]) -> None:
    if heads is None:
        for key in ("head", "labels", "weight"):
            if getattr(source, key) is not None:
                raise problem("the run has no heads", HEADS_HINT, *place, key, code="missing-key")
    elif source.head is not None and source.head not in heads:
        hint = nearest(source.head, heads, "Known heads are")
        raise problem(f"unknown head {source.head!r}", hint, *place, "head", code="unknown-choice")
    elif source.head is None and source.labels is None:
        hint = "Name the head that its class directories belong to, or give labels"
        raise problem("these images have no labels", hint, *place, "head", code="missing-key")


def _require_keys(source: ImagesConfig, heads: Mapping[str, int] | None, place: tuple[str | int, ...]) -> None:
    """Refuse `labels`, `exclude` and heads where the reader does not name its images."""
    if source.name in ("folder", "tar"):
        return
    if source.name.startswith("wds/"):
        if source.exclude is not None and heads is None:
            hint = "Give the run heads, or use name: folder or tar"
            raise problem("wds excludes images only in a run with heads", hint, *place, "exclude", code="missing-key")
        return
    for key in ("labels", "exclude"):
        if getattr(source, key) is not None:
            text = f"images of {source.name} have no keys to find them by"
            raise problem(text, "Give name: folder, tar or wds", *place, key, code="conflicting-values")
    if heads is not None:
        text = f"{source.name} cannot be read in a run with heads"
        raise problem(text, "Give name: folder, tar or wds", *place, "name", code="conflicting-values")
