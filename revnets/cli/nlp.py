"""Commands of the package `nlp`, which a wheel installs as `revnets_nlp`.

A top-level package `nlp` in a wheel would conflict with packages of users. The package is imported when a command is
first used.
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
