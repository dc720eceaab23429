"""Behavior that depends on the version of PyTorch."""

from __future__ import annotations

import torch

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))

FSDP_AVERAGES = TORCH != (2, 7)
"""With gloo, `fully_shard` of PyTorch 2.7 sums gradients over processes instead of averaging them."""
