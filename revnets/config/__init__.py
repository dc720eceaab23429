"""Networks as data: the YAML loader, the registry of components and the specification that checks them."""

from revnets.config.errors import ConfigError, SpecError
from revnets.config.loader import Strict, load
from revnets.engine.memory_mode import memory_modes

__all__ = ["ConfigError", "SpecError", "Strict", "load", "memory_modes"]
