"""Models of Hugging Face transformers by name: `hf:NAME`, where the name is a folder or one of their hub.

The module is what an entry of the group `revnets.models` refers to (`revnets.models.loading`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from revnets.config.errors import SpecError


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
        SpecError: transformers is not installed, or the configuration names code outside of it.
    """
    try:
        import transformers
    except ImportError:
        raise SpecError(
            f"hf:{name}", "", "transformers is not installed", "pip install 'revnets[hf]'", code="missing-dependency"
        ) from None
    config: Any = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
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
