"""The registry of components before other packages are imported."""

import pytest

from revnets.config import registry


@pytest.fixture
def own_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide components that other tests register, because error messages list all components."""
    own = {
        kind: {name: part for name, part in parts.items() if part.__module__.startswith("revnets.")}
        for kind, parts in registry._REGISTRY.items()
    }
    monkeypatch.setattr(registry, "_REGISTRY", own)
