"""Paths of the packaged configurations."""

from __future__ import annotations

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"
"""Directory of the built-in recipes: `revnets train digits` uses `configs/digits.yaml`."""

FOLDERS = (CONFIGS, CONFIGS / "finetune", CONFIGS / "segmentation", CONFIGS / "detection")
"""Directories that are searched for recipes by name."""

MODELS = CONFIGS / "models"
"""Directory with a YAML for each model, from which `revnets.build` builds the same network."""
