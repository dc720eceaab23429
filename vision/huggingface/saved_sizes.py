"""Folders of transformers with a RevCol inside: what `config.json` asks for is compared with the weights beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from revnets import SpecError
from revnets.models.saved_folder import require_config, require_room
from vision.huggingface.configuration import MAX_LABELS, RevColBackboneConfig

NEW_NUMBERS = 2**27
"""How many numbers a model may have beyond those in its files: a classifier of other classes, 512 MiB at most."""

REPEATED = ("layers", "num_convs", "num_feature_levels")
"""Endings of keys that say how many modules of a kind there are."""


def require_fitting(kind: Any, source: Any, options: Mapping[str, Any]) -> None:
    """A folder's `config.json` asks for no larger model than its weights are, before memory is taken for it.

    Args:
        kind: class of the model.
        source: folder, or a name of the hub, of which nothing is here to compare.
        options: of `from_pretrained`.

    Raises:
        revnets.SpecError: it asks for more, or a file of the folder cannot be read.
        ValueError: the configuration cannot be used.
    """
    folder = Path(source or "") / (options.get("subfolder") or "")
    require_config(folder)
    if not (folder / "config.json").exists():
        return
    _require_labels(folder / "config.json")
    given = options.get("config")
    config = given if isinstance(given, PreTrainedConfig) else kind.config_class.from_pretrained(folder)
    blocks = dict(_repeated(config.to_dict()))
    backbone = config if isinstance(config, RevColBackboneConfig) else getattr(config, "backbone_config", None)
    if isinstance(backbone, RevColBackboneConfig):
        spec = backbone.spec()
        blocks["columns"] = spec.columns * sum(level.depth for level in spec.levels)

    def build() -> nn.Module:
        return kind(config)

    require_room(folder, build, blocks, "dims", NEW_NUMBERS)


def _repeated(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _repeated(value)
        elif key == "pool_scales" and isinstance(value, (list, tuple)):
            yield key, len(value)
        elif str(key).endswith(REPEATED) and isinstance(value, int):
            yield key, value


def _require_labels(path: Path) -> None:
    """There is a name to be made for each class, before any module is built."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(str(path), "", f"not a file of JSON ({type(error).__name__})", code="wrong-format") from None
    labels = values.get("num_labels") if isinstance(values, dict) else None
    if isinstance(labels, (int, float)) and labels > MAX_LABELS:
        problem = f"{labels:,} are more than {MAX_LABELS:,}"
        raise SpecError(str(path), "num_labels", problem, "Use the configuration of these weights", code="out-of-range")
