"""Where the packaged configurations are."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
"""Recipes that come with the package: `revnets train digits` means `configs/digits.yaml`."""


FOLDERS = (CONFIGS, CONFIGS / "finetune", CONFIGS / "segmentation", CONFIGS / "detection")
"""Where recipes are looked for by their names."""


MODELS = CONFIGS / "models"
"""A YAML for each model; `revnets.build` makes the same net from it."""
