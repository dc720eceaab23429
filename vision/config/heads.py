"""Which sources of a run have labels of which of its heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from revnets.config.errors import nearest, problem
from vision.config.data import ImagesConfig, SourcesConfig


def require_heads(data: Any, heads: Mapping[str, int] | None) -> None:
    """Check which classes the images of a run have.

    Args:
        heads: of the run; None if it has a single set of classes.

    Raises:
        PydanticCustomError: images have no label of any head, or of one that is not there; or a weight has no
            effect.
    """
    is_list = isinstance(data, SourcesConfig)
    sources = data.sources if isinstance(data, SourcesConfig) else [data]
    for number, source in enumerate(sources):
        place = ("data", number) if is_list else ("data",)
        if not isinstance(source, ImagesConfig):
            if heads is not None:
                raise problem("the data have one set of classes", "Remove the key", "heads", code="conflicting-values")
            continue
        if heads is None:
            for key in ("head", "labels", "weight"):
                if getattr(source, key) is not None:
                    remedy = "Name the sets of classes, as in heads: {in1k: 1000, places: 365}"
                    raise problem("the run has no heads", remedy, *place, key, code="missing-key")
        elif source.head is not None and source.head not in heads:
            remedy = nearest(source.head, heads, "There are")
            raise problem(f"there is no head {source.head!r}", remedy, *place, "head", code="unknown-choice")
        elif source.head is None and source.labels is None:
            remedy = "Name the head that its class folders belong to, or give labels"
            raise problem("these images have no labels", remedy, *place, "head", code="missing-key")
    if is_list and heads is None:
        remedy = "Name the sets of classes, as in heads: {in1k: 1000, places: 365}"
        raise problem("several sources belong to heads", remedy, "heads", code="missing-key")
    if heads is not None and len(sources) == 1 and sources[0].weight is not None:
        place = ("data", 0) if is_list else ("data",)
        raise problem("a single source is a whole epoch", "Remove the key", *place, "weight", code="conflicting-values")
