"""A small supervised model with its loss, and a batch for it."""

from __future__ import annotations

import timm
import torch
from torch import Tensor

from vision.config.learning import SupervisionConfig
from vision.supervision.task import SupervisionTask

CLASSES = 5


def create_task(columns: int = 4, name: str = "test_revcol", config: SupervisionConfig | None = None, **options):
    torch.manual_seed(0)
    model_options = {key: options.pop(key) for key in ("memory", "drop_path_rate", "in_chans") if key in options}
    model = timm.create_model(name, num_classes=CLASSES, columns=columns, **model_options)
    return SupervisionTask(model, config, verbose=False, **options)


def batch(size: int = 3, side: int = 64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(size, 3, side, side), torch.randint(CLASSES, (size,))
