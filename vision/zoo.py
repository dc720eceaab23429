"""timm's names for `revnets show`, `plan` and `audit` (entry-point group `revnets.models`)."""

from __future__ import annotations

from typing import Any

import timm
from torch import nn

from vision import revcol as revcol  # timm knows the family from here on


def names() -> list[str]:
    """Every model that timm knows; those without reversible columns are told so."""
    return timm.list_models()


def create(name: str, **options: Any) -> nn.Module:
    """A model with the weights of its initialisation; the options are those of `timm.create_model`."""
    return timm.create_model(name, **options)
