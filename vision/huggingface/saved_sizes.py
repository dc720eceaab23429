"""Checks that the `config.json` of a saved RevCol model does not describe a larger model than its weights."""

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
from revnets.models.saved_folder import (
    MAX_CONFIG,
    configuration_errors,
    require_config,
    require_room,
    require_unquantized,
)
from revnets.utils.regular_files import read_regular
from vision.huggingface.configuration import MAX_LABELS, RevColBackboneConfig
from vision.revcol import variants

NEW_NUMBERS = 2**27
"""Maximum number of parameters without saved weights, such as those of a new classifier (at most 512 MiB)."""

REPEATED = ("layers", "num_convs", "num_feature_levels")
"""Suffixes of keys that set the number of modules of a kind."""


def require_fitting(kind: Any, source: Any, options: Mapping[str, Any]) -> None:
    """Require that `config.json` does not describe a larger model than the weights, before memory is allocated.

    Args:
        kind: Class of the model.
        source: Directory, or a name of the hub, which is not checked.
        options: Options of `from_pretrained`. `config` may be a configuration, or its file or directory.

    Raises:
        revnets.SpecError: If the model is larger than its weights, its backbone is not a RevCol, or a file is unusable.
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
        require_unquantized(path, values)
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
    """Return the file that transformers reads for a directory or file. It does not exist for a name of the hub."""
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
        raise SpecError(str(path), "", f"not a JSON file ({type(error).__name__})", code="wrong-format") from None
    if not isinstance(values, dict):
        raise SpecError(str(path), "", what(values), "Use the file of the model", code="wrong-format")
    if "configuration_files" in values:
        problem = "references to other files are not supported"
        raise SpecError(str(path), "configuration_files", problem, "Remove the key", code="reserved-key")
    return values


def _require_labels(path: Path, values: Mapping[str, Any]) -> None:
    """Limit the number of classes, because transformers creates a name for each one before it builds a module."""
    for inner in (values, *(value for value in values.values() if isinstance(value, Mapping))):
        labels = inner.get("num_labels")
        if isinstance(labels, (int, float)) and labels > MAX_LABELS:
            problem = f"{labels:,} exceeds {MAX_LABELS:,}"
            hint = "Use the configuration of these weights"
            raise SpecError(str(path), "num_labels", problem, hint, code="out-of-range")


def _require_backbone(path: Path, values: Mapping[str, Any], model_type: str) -> None:
    """Require a RevCol backbone, of transformers or timm. Others have no size limit or are loaded from the hub."""
    if values.get("model_type") != model_type:  # transformers would read a part of the file
        problem = f"{show(values.get('model_type'))}, but the model is {model_type}"
        raise SpecError(str(path), "model_type", problem, "Use the configuration of these weights", code="wrong-format")
    backbone = values.get("backbone_config")
    backbone = backbone if isinstance(backbone, Mapping) else {}
    of_timm = backbone.get("model_type") == "timm_backbone" and backbone.get("backbone") in variants()
    if not of_timm and backbone.get("model_type") != RevColBackboneConfig.model_type:
        problem = "the backbone is not a RevCol"
        hint = "Use a segmenter with a RevCol backbone"
        raise SpecError(str(path), "backbone_config", problem, hint, code="unknown-model")
    for key in ("backbone", "use_pretrained_backbone"):
        if values.get(key):
            problem = f"{show(values[key])}, but backbone_config already sets the backbone"
            raise SpecError(str(path), key, problem, "Remove the key", code="conflicting-values")
