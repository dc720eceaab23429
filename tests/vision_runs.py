"""A run that is small but has everything: augmentation, drop path, mixup, accumulation, averaged weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TINY: dict[str, Any] = {
    "model": {
        "columns": 3,
        "stem": {"type": "patchify", "in_chans": 1, "patch": 2},
        "levels": [
            {"dim": 3, "depth": 1, "block": "convnext", "layer_scale": 0.1},
            {"dim": 5, "depth": 1, "block": "convnext", "layer_scale": 0.1},
        ],
        "head": {"type": "classifier", "num_classes": 10},
        "drop_path": 0.2,
    },
    "data": {"name": "digits", "img_size": 8},
    "epochs": 2,
    "batch_size": 120,
    "grad_accum": 2,  # 5 updates an epoch
    "optimizer": {"name": "adamw", "lr": 0.01},
    "schedule": {"warmup_epochs": 0.5},
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "mixup": {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
    "ema": {"decay": 0.9},
    "log_every": 3,
    "save_every": 2,
}


def tiny(output: Path, **changes: Any) -> dict[str, Any]:
    return {**TINY, "output": str(output), **changes}
