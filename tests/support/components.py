"""The registry of components as it is before anything but this package is imported."""

import pytest

from revnets.config import registry


@pytest.fixture
def own_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests import modules that register components, and messages list those that there are."""
    own = {
        kind: {name: part for name, part in parts.items() if part.__module__.startswith("revnets.")}
        for kind, parts in registry._REGISTRY.items()
    }
    monkeypatch.setattr(registry, "_REGISTRY", own)
