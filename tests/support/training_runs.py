"""A small run with all features: augmentation, drop path, mixup, accumulation, averaged weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from vision.checkpoints import reader
from vision.training.run_log import LOG, read_log

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
    "seed": 1,  # with this seed the second epoch is the best
    "data": {"name": "digits", "img_size": 8},
    "epochs": 2,
    "batch_size": 120,
    "grad_accum": 2,  # 5 updates per epoch
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


def assert_same_run(mine: Path, other: Path, suffix: str = ".pt") -> None:
    """Assert that weights, state and log are equal bit for bit. `suffix` is empty for sharded checkpoints."""
    for name in (f"step-0000010{suffix}", f"best{suffix}"):
        ours, theirs = (reader.read(folder / "checkpoints" / name) for folder in (mine, other))
        for part in ("model", "ema", "heads", "heads_ema", "optimizer", "progress", "scaler"):
            assert_same(ours[part], theirs[part], part)
    logs = [
        [{key: value for key, value in line.items() if key != "images_per_second"} for line in read_log(folder / LOG)]
        for folder in (mine, other)
    ]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [3, 5, 5, 8, 10, 10]
    assert sorted(os.listdir(mine / "checkpoints")) == [
        f"{name}{suffix}" for name in ("best", "step-0000008", "step-0000010")
    ]


def assert_same(ours, theirs, where: str) -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(theirs), where
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}.{index}")
    else:
        assert ours == theirs, where
