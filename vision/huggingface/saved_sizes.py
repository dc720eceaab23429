"""Folders of transformers with a RevCol inside: what `config.json` asks for is compared with the weights beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from revnets import SpecError
from revnets.config.errors import show, what
from revnets.models.saved_folder import MAX_CONFIG, configuration_errors, require_config, require_room
from revnets.utils.regular_files import read_regular
from vision.huggingface.configuration import MAX_LABELS, RevColBackboneConfig
from vision.revcol import variants

NEW_NUMBERS = 2**27
"""How many numbers a model may have beyond those in its files: a classifier of other classes, 512 MiB at most."""

REPEATED = ("layers", "num_convs", "num_feature_levels")
"""Endings of keys that say how many modules of a kind there are."""


def require_fitting(kind: Any, source: Any, options: Mapping[str, Any]) -> None:
    """A folder's `config.json` asks for no larger model than its weights are, before memory is taken for it.

    Args:
        kind: class of the model.
        source: folder, or a name of the hub, of which nothing is here to compare.
        options: of `from_pretrained`; `config` may be a configuration, or its file or folder.

    Raises:
        revnets.SpecError: it asks for more or for a backbone that is no RevCol, or a file of the folder cannot be used.
    """
    subfolder = options.get("subfolder") or ""
    folder = Path(source or "") / subfolder
    given = options.get("config")
    if not source or not folder.is_dir():
        return
    require_config(folder)
    path = folder
    if not isinstance(given, PreTrainedConfig):
        path = _config_file(source if given is None else given, subfolder)
        if not path.exists():
            return
    with configuration_errors(path):
        values = given.to_dict() if isinstance(given, PreTrainedConfig) else _read(path)
        _require_labels(path, values)
        if kind.config_class is not RevColBackboneConfig:
            _require_backbone(path, values, kind.config_class.model_type)
        config = given if isinstance(given, PreTrainedConfig) else kind.config_class.from_pretrained(path)
        blocks = dict(_repeated(config.to_dict()))
        backbone = config if isinstance(config, RevColBackboneConfig) else config.backbone_config
        if isinstance(backbone, RevColBackboneConfig):
            spec = backbone.spec()
            blocks["columns"] = spec.columns * sum(level.depth for level in spec.levels)

    def build() -> nn.Module:
        return kind(config)

    require_room(folder, build, blocks, "dims" if backbone is config else "", NEW_NUMBERS)


def _config_file(given: Any, subfolder: str) -> Path:
    """The file that transformers reads for a folder or a file, which does not exist for a name of the hub."""
    if os.path.isfile(os.path.join(subfolder, given)):  # as transformers decides
        return Path(given)
    require_config(Path(given) / subfolder)
    return Path(given) / subfolder / "config.json"


def _repeated(values: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _repeated(value)
        elif key == "pool_scales" and isinstance(value, (list, tuple)):
            yield key, len(value)
        elif str(key).endswith(REPEATED) and isinstance(value, int):
            yield key, value


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_regular(path, MAX_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(str(path), "", f"not a file of JSON ({type(error).__name__})", code="wrong-format") from None
    if not isinstance(values, dict):
        raise SpecError(str(path), "", what(values), "Use the file of the model", code="wrong-format")
    if "configuration_files" in values:
        problem = "it names other files, which are not read"
        raise SpecError(str(path), "configuration_files", problem, "Remove it", code="reserved-key")
    return values


def _require_labels(path: Path, values: Mapping[str, Any]) -> None:
    """There is a name to be made for each class, before any module is built."""
    for inner in (values, *(value for value in values.values() if isinstance(value, Mapping))):
        labels = inner.get("num_labels")
        if isinstance(labels, (int, float)) and labels > MAX_LABELS:
            problem = f"{labels:,} are more than {MAX_LABELS:,}"
            remedy = "Use the configuration of these weights"
            raise SpecError(str(path), "num_labels", problem, remedy, code="out-of-range")


def _require_backbone(path: Path, values: Mapping[str, Any], model_type: str) -> None:
    """A segmenter has a RevCol inside, of transformers or of timm: others are not bounded, or come from the hub."""
    if values.get("model_type") != model_type:  # of another type, transformers reads a part of the file
        problem = f"{show(values.get('model_type'))}, but the model is {model_type}"
        raise SpecError(str(path), "model_type", problem, "Use the configuration of these weights", code="wrong-format")
    backbone = values.get("backbone_config")
    backbone = backbone if isinstance(backbone, Mapping) else {}
    of_timm = backbone.get("model_type") == "timm_backbone" and backbone.get("backbone") in variants()
    if not of_timm and backbone.get("model_type") != RevColBackboneConfig.model_type:
        problem = "the backbone is no RevCol"
        raise SpecError(str(path), "backbone_config", problem, "Use a segmenter with one", code="unknown-model")
    for key in ("backbone", "use_pretrained_backbone"):
        if values.get(key):
            problem = f"{show(values[key])}, but the backbone is that of backbone_config"
            raise SpecError(str(path), key, problem, "Remove it", code="conflicting-values")
