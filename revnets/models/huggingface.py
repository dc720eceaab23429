"""Models of Hugging Face transformers by name: `hf:NAME`, where the name is a folder or one of their hub.

The module is what an entry of the group `revnets.models` refers to (`revnets.models.loading`).
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
"""More would take minutes to build, even without weights."""

MAX_BYTES = 2**24
"""Of a configuration."""


def names() -> list[str]:
    """None: the hub has too many to list."""
    return []


def create(name: str, **options: Any) -> nn.Module:
    """A model of the architecture that its configuration names.

    Weights are read if the folder has some as safetensors, else they are those of the initialization; on the meta
    device there are none. Keys and values are not cached (`use_cache`), as training needs it.

    Args:
        name: folder with a `config.json`, or a name of the hub, whose configuration is then downloaded.
        options: replace values of the configuration.

    Raises:
        SpecError: transformers is not installed, or the configuration names code outside of it, is no regular file, or
            asks for more layers than a network has.
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
            raise SpecError(f"hf:{name}", str(key), f"{value:,} are more than {MAX_LAYERS:,}", code="too-large")
