"""The version of PyTorch, for tests of what older versions cannot do."""

from __future__ import annotations

import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
