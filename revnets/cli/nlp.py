"""The commands of nlp/ under one name: a checkout has that folder as `nlp`, a wheel as `revnets_nlp`.

A wheel with a top-level `nlp` would be in everybody's way. Nothing is imported before a command is asked for.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    folder = "revnets_nlp" if find_spec("revnets_nlp") else "nlp"
    return getattr(import_module(f"{folder}.cli"), name)
