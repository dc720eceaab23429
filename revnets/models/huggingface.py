"""Hugging Face transformers models by name: `hf:NAME`, where NAME is a directory or a name on the hub.

The entry point `hf` of the group `revnets.models` refers to this module (`revnets.models.loading`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from revnets.config.errors import SpecError
from revnets.utils.regular_files import require_regular

MAX_LAYERS = 10_000
"""Maximum number of layers; more take minutes to build, even without weights."""

MAX_BYTES = 2**24
"""Maximum size of a configuration file."""


def names() -> list[str]:
    """Return no names: the hub has too many models to list."""
    return []


def create(name: str, **options: Any) -> nn.Module:
    """Create a model of the architecture in its configuration.

    Weights are loaded from safetensors files in the directory, if there are any; otherwise they are initialized. On the
    meta device no weights are loaded. The cache of keys and values is off (`use_cache`), as training requires.

    Args:
        name: Directory with a `config.json`, or a name on the hub, whose configuration is downloaded.
        options: Values that replace those of the configuration.

    Returns:
        The model.

    Raises:
        SpecError: If transformers is not installed, or the configuration refers to code outside transformers, is not a
            regular file, or has too many layers.
    """
    try:
        import transformers
    except ImportError:
        raise SpecError(
            f"hf:{name}", "", "transformers is not installed", "pip install 'revnets[hf]'", code="missing-dependency"
        ) from None
    _require_file(name)
    config: Any = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    _require_bounded(name, config.to_dict())
    if hasattr(config, "use_cache"):
        config.use_cache = False
    architecture = next(iter(getattr(config, "architectures", None) or []), "AutoModel")
    kind = getattr(transformers, str(architecture), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        kind = None
        if architecture != "AutoModel":
            problem = f"transformers has no architecture {architecture!r}"
            raise SpecError(f"hf:{name}", "architectures", problem, "Update transformers", code="unknown-model")
    if torch.get_default_device().type != "meta" and any(Path(name).glob("*.safetensors")):
        loader: Any = kind or transformers.AutoModel
        return loader.from_pretrained(name, config=config, use_safetensors=True, local_files_only=True)
    return transformers.AutoModel.from_config(config) if kind is None else kind(config)


def _require_file(name: str) -> None:
    path = Path(name) / "config.json"
    try:
        require_regular(path)
        if path.exists() and path.stat().st_size > MAX_BYTES:
            raise SpecError(f"hf:{name}", "", f"config.json is larger than {MAX_BYTES:,} bytes", code="too-large")
    except OSError as error:
        raise SpecError(f"hf:{name}", "", f"config.json: {error.strerror}", code="not-a-file") from None


def _require_bounded(name: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, Mapping):
            _require_bounded(name, value)
        elif "layer" in str(key) and isinstance(value, int) and value > MAX_LAYERS:
            raise SpecError(
                f"hf:{name}", str(key), f"{value:,} layers; at most {MAX_LAYERS:,} are supported", code="too-large"
            )
