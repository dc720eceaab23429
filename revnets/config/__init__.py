"""Configuration: the YAML loader, the component registry and the network specification."""

from revnets.config.errors import ConfigError, SpecError
from revnets.config.loader import Strict, load
from revnets.engine.memory_mode import memory_modes

__all__ = ["ConfigError", "SpecError", "Strict", "load", "memory_modes"]
